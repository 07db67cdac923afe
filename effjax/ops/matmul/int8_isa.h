// The instruction sets of int8_dot.cc: what one step of a product is on this CPU.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// Keeps the compiler from moving what uses a vector past this line.
#ifndef EFFJAX_KEEP_ORDER
#define EFFJAX_KEEP_ORDER(vector) asm volatile("" : "+v"(vector))
#endif

namespace {

// An instruction set. `Held` is how a code of x is kept, kStep how many codes of a row
// one step multiplies, kRows x kCols the largest tile of sums over whole rows of w;
// kTall x kPanel that of a panel of w, and 0 where panels are not used. w is taken as
// w + kOffset, and a sum corrected by kOffset times the sum of the row of x.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)

// vpdpbusd multiplies unsigned by signed codes: w is read as w + 128. Its sums wrap
// around like int32, so the correction is exact even if one of them passes 2^31.
struct Isa {
  using Held = int8_t;
  using Codes = __m512i;
  using Sum = __m512i;
  static constexpr int kStep = 64, kRows = 4, kCols = 4, kOffset = 128;
  static constexpr int kTall = 8, kPanel = 32, kSums = 2;
  static Sum Zero() { return _mm512_setzero_si512(); }
  static Codes LoadX(const Held* x) { return _mm512_loadu_si512(x); }
  static Codes LoadW(const int8_t* w) {
    return _mm512_xor_si512(_mm512_loadu_si512(w), _mm512_set1_epi8(-128));
  }
  static Sum Step(Sum sum, Codes x, Codes w) { return _mm512_dpbusd_epi32(sum, w, x); }
  static int32_t Total(Sum sum) { return _mm512_reduce_add_epi32(sum); }
  static Codes FourOfX(const Held* x) {
    int32_t four;
    std::memcpy(&four, x, sizeof four);
    return _mm512_set1_epi32(four);
  }
  static __m256i Packed(__m256i w) {
    return _mm256_xor_si256(w, _mm256_set1_epi8(-128));
  }
  static Codes FromPanel(const int8_t* w) { return _mm512_loadu_si512(w); }
  static void Add(const Sum* sums, int32_t start, int32_t* y) {
    for (int i = 0; i < kSums; ++i) {
      const Sum before = _mm512_add_epi32(_mm512_loadu_si512(y + 16 * i),
                                          _mm512_set1_epi32(start));
      _mm512_storeu_si512(y + 16 * i, _mm512_add_epi32(before, sums[i]));
    }
  }
};

#elif defined(__AVX2__)

// vpmaddwd on codes widened to int16: the widening of w is shared by the rows of a
// tile. vpmaddubsw takes twice the codes an instruction but needs as many in all (signs
// moved to w, pairs widened) and cannot hold -128 * -128 * 2.
struct Isa {
  using Held = int16_t;
  using Codes = __m256i;
  using Sum = __m256i;
  static constexpr int kStep = 16, kRows = 3, kCols = 3, kOffset = 0;
  static constexpr int kTall = 6, kPanel = 8, kSums = 2;
  static Sum Zero() { return _mm256_setzero_si256(); }
  static Codes LoadX(const Held* x) {
    Codes codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    // Stays in a register: compilers would load it again for each product of a tile.
    asm("" : "+x"(codes));
    return codes;
  }
  static Codes LoadW(const int8_t* w) {
    return _mm256_cvtepi8_epi16(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
  }
  static Sum Step(Sum sum, Codes x, Codes w) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(x, w));
  }
  static int32_t Total(Sum sum) {
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sum),
                                 _mm256_extracti128_si256(sum, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1));
    return _mm_cvtsi128_si32(half);
  }
  static Codes FourOfX(const Held* x) {
    int64_t four;
    std::memcpy(&four, x, sizeof four);
    return _mm256_set1_epi64x(four);
  }
  static __m256i Packed(__m256i w) { return w; }
  static Codes FromPanel(const int8_t* w) { return LoadW(w); }
  // Two lanes of a sum belong to one output.
  static void Add(const Sum* sums, int32_t, int32_t* y) {
    auto* at = reinterpret_cast<__m256i*>(y);
    const Sum pairs = _mm256_permute4x64_epi64(_mm256_hadd_epi32(sums[0], sums[1]),
                                               _MM_SHUFFLE(3, 1, 2, 0));
    _mm256_storeu_si256(at, _mm256_add_epi32(_mm256_loadu_si256(at), pairs));
  }
};

#else

// Plain loops over short arrays, which compilers turn into what the machine has.
struct Isa {
  using Held = int8_t;
  static constexpr int kStep = 16, kRows = 2, kCols = 2, kOffset = 0, kPanel = 0;
  struct Codes {
    int8_t at[kStep];
  };
  struct Sum {
    int32_t at[kStep / 4];
  };
  static Sum Zero() { return {}; }
  static Codes LoadX(const Held* x) { return LoadW(x); }
  static Codes LoadW(const int8_t* w) {
    Codes codes;
    std::memcpy(codes.at, w, kStep);
    return codes;
  }
  static Sum Step(Sum sum, Codes x, Codes w) {
    for (int i = 0; i < kStep; ++i) sum.at[i / 4] += int32_t{x.at[i]} * w.at[i];
    return sum;
  }
  static int32_t Total(Sum sum) {
    int32_t total = 0;
    for (int32_t part : sum.at) total += part;
    return total;
  }
};

#endif

}  // namespace
