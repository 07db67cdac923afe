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

// Unrolls a short loop before arrays become registers: later is too late for gcc.
#if defined(__clang__)
#define EFFJAX_UNROLL _Pragma("unroll")
#else
#define EFFJAX_UNROLL _Pragma("GCC unroll 16")
#endif
#define EFFJAX_INLINE __attribute__((always_inline))

namespace {

// An instruction set. `Held` is how a code of x is kept, kStep how many codes of a row
// one step multiplies, kRows x kCols the largest tile of sums over whole rows of w;
// kTall x kPanel that of a panel of w, and 0 where panels are not used, kPanelRows the
// rows of x from which on rearranging w pays. w is taken as w + kOffset, and a sum
// corrected by kOffset times the sum of the row of x.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)

// vpdpbusd multiplies unsigned by signed codes: w is read as w + 128. Its sums wrap
// around like int32, so the correction is exact even if one of them passes 2^31.
struct Isa {
  using Held = int8_t;
  using Codes = __m512i;
  using Sum = __m512i;
  static constexpr int kStep = 64, kRows = 4, kCols = 4, kOffset = 128;
  static constexpr int kTall = 8, kPanel = 32, kPanelRows = 64, kSums = 2;
  static Sum Zero() { return _mm512_setzero_si512(); }
  static Codes LoadX(const Held* x) {
    Codes codes = _mm512_loadu_si512(x);
    // Stays in a register: compilers would load it again for each product of a tile.
    EFFJAX_KEEP_ORDER(codes);
    return codes;
  }
  static Codes LoadW(const int8_t* w) {
    return _mm512_xor_si512(_mm512_loadu_si512(w), _mm512_set1_epi8(-128));
  }
  static Codes LoadRest(const int8_t* w, int64_t count) {
    const Codes codes = _mm512_maskz_loadu_epi8((uint64_t{1} << count) - 1, w);
    return _mm512_xor_si512(codes, _mm512_set1_epi8(-128));
  }
  static Sum Step(Sum sum, Codes x, Codes w) {
    sum = _mm512_dpbusd_epi32(sum, w, x);
    // Without it gcc copies every sum to another register and back.
    EFFJAX_KEEP_ORDER(sum);
    return sum;
  }
  static constexpr int Padded(int) { return 16; }
  // Up to 16 vectors are added up across at once, neighbours folded into one four times.
  // Recursion and no loop: only what has a constant place stays in registers.
  template <int N>
  EFFJAX_INLINE static void Totals(const Sum (&sums)[N], int32_t* totals) {
    static_assert(N <= 16);
    _mm512_storeu_si512(totals, Folded<4, 0>(sums));
  }
  template <int kLevel, int kAt, int N>
  EFFJAX_INLINE static Sum Folded(const Sum (&sums)[N]) {
    if constexpr ((kAt << kLevel) >= N) {
      return Zero();
    } else if constexpr (kLevel == 0) {
      return sums[kAt];
    } else {
      const Sum a = Folded<kLevel - 1, 2 * kAt>(sums);
      const Sum b = Folded<kLevel - 1, 2 * kAt + 1>(sums);
      if constexpr (kLevel == 1) {
        return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b),
                                _mm512_unpackhi_epi32(a, b));
      } else if constexpr (kLevel == 2) {
        return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b),
                                _mm512_unpackhi_epi64(a, b));
      } else {
        return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88),
                                _mm512_shuffle_i32x4(a, b, 0xdd));
      }
    }
  }
  static Codes FourOfX(const Held* x) {
    int32_t four;
    std::memcpy(&four, x, sizeof four);
    return _mm512_set1_epi32(four);
  }
  static __m256i Packed(__m256i w) {
    return _mm256_xor_si256(w, _mm256_set1_epi8(-128));
  }
  static Codes FromPanel(const int8_t* w) { return _mm512_loadu_si512(w); }
  static void Begin(const Sum* sums, int32_t start, int32_t* y) {
    for (int i = 0; i < kSums; ++i) {
      _mm512_storeu_si512(y + 16 * i,
                          _mm512_add_epi32(_mm512_set1_epi32(start), sums[i]));
    }
  }
  static void Add(const Sum* sums, int32_t* y) {
    for (int i = 0; i < kSums; ++i) {
      _mm512_storeu_si512(
          y + 16 * i, _mm512_add_epi32(_mm512_loadu_si512(y + 16 * i), sums[i]));
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
  static constexpr int kTall = 6, kPanel = 8, kPanelRows = 12, kSums = 2;
  static Sum Zero() { return _mm256_setzero_si256(); }
  static Codes LoadX(const Held* x) {
    Codes codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    asm("" : "+x"(codes));  // as above
    return codes;
  }
  static Codes LoadW(const int8_t* w) {
    return _mm256_cvtepi8_epi16(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
  }
  static Codes LoadRest(const int8_t* w, int64_t count) {
    int8_t rest[kStep] = {};
    std::memcpy(rest, w, count);
    return LoadW(rest);
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
  static constexpr int Padded(int count) { return count; }
  template <int N>
  EFFJAX_INLINE static void Totals(const Sum (&sums)[N], int32_t* totals) {
    EFFJAX_UNROLL for (int i = 0; i < N; ++i) totals[i] = Total(sums[i]);
  }
  static Codes FourOfX(const Held* x) {
    int64_t four;
    std::memcpy(&four, x, sizeof four);
    return _mm256_set1_epi64x(four);
  }
  static __m256i Packed(__m256i w) { return w; }
  static Codes FromPanel(const int8_t* w) { return LoadW(w); }
  // Two lanes of a sum belong to one output.
  static Sum Pairs(const Sum* sums) {
    return _mm256_permute4x64_epi64(_mm256_hadd_epi32(sums[0], sums[1]),
                                    _MM_SHUFFLE(3, 1, 2, 0));
  }
  static void Begin(const Sum* sums, int32_t, int32_t* y) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), Pairs(sums));
  }
  static void Add(const Sum* sums, int32_t* y) {
    auto* at = reinterpret_cast<__m256i*>(y);
    _mm256_storeu_si256(at, _mm256_add_epi32(_mm256_loadu_si256(at), Pairs(sums)));
  }
};

#else

// Plain loops over short arrays, which compilers turn into what the machine has.
struct Isa {
  using Held = int8_t;
  static constexpr int kStep = 16, kRows = 2, kCols = 2, kOffset = 0;
  static constexpr int kPanel = 0, kPanelRows = 0;
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
  static Codes LoadRest(const int8_t* w, int64_t count) {
    int8_t rest[kStep] = {};
    std::memcpy(rest, w, count);
    return LoadW(rest);
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
  static constexpr int Padded(int count) { return count; }
  template <int N>
  EFFJAX_INLINE static void Totals(const Sum (&sums)[N], int32_t* totals) {
    EFFJAX_UNROLL for (int i = 0; i < N; ++i) totals[i] = Total(sums[i]);
  }
};

#endif

}  // namespace
