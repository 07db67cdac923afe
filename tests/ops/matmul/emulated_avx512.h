// The AVX-512 instructions that int8_isa.h uses, as plain loops: included before it, they
// let a CPU without them check the form of the kernel that is written for them.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

struct Emulated {
  uint8_t at[64];
};

namespace emulated {

inline Emulated Load(const void* from) {
  Emulated value;
  std::memcpy(value.at, from, 64);
  return value;
}
inline void Store(void* to, Emulated value) { std::memcpy(to, value.at, 64); }
inline Emulated Same8(int8_t byte) {
  Emulated value;
  std::memset(value.at, byte, 64);
  return value;
}
inline Emulated Same32(int32_t word) {
  Emulated value;
  for (int i = 0; i < 16; ++i) std::memcpy(value.at + 4 * i, &word, 4);
  return value;
}
inline uint32_t Lane(const Emulated& value, int i) {
  uint32_t lane;
  std::memcpy(&lane, value.at + 4 * i, 4);
  return lane;
}
inline Emulated Xor(Emulated a, Emulated b) {
  for (int i = 0; i < 64; ++i) a.at[i] ^= b.at[i];
  return a;
}
inline Emulated Add(Emulated a, Emulated b) {
  for (int i = 0; i < 16; ++i) {
    const uint32_t sum = Lane(a, i) + Lane(b, i);
    std::memcpy(a.at + 4 * i, &sum, 4);
  }
  return a;
}
// Four products of unsigned codes of `a` with signed ones of `b` in each lane.
inline Emulated Dpbusd(Emulated sum, Emulated a, Emulated b) {
  for (int i = 0; i < 16; ++i) {
    uint32_t lane = Lane(sum, i);
    for (int k = 4 * i; k < 4 * i + 4; ++k) {
      lane += static_cast<uint32_t>(int32_t{a.at[k]} * static_cast<int8_t>(b.at[k]));
    }
    std::memcpy(sum.at + 4 * i, &lane, 4);
  }
  return sum;
}
inline Emulated LoadSome(uint64_t mask, const void* from) {
  Emulated value = Same8(0);
  for (int i = 0; i < 64; ++i) {
    if (mask >> i & 1) value.at[i] = static_cast<const uint8_t*>(from)[i];
  }
  return value;
}
// Within each quarter: the lower or upper half of both, by turns, in parts of `bytes`.
inline Emulated Unpack(Emulated a, Emulated b, int bytes, int half) {
  Emulated value;
  for (int quarter = 0; quarter < 64; quarter += 16) {
    for (int i = 0; i < 8; i += bytes) {
      const int from = quarter + 8 * half + i, to = quarter + 2 * i;
      std::memcpy(value.at + to, a.at + from, bytes);
      std::memcpy(value.at + to + bytes, b.at + from, bytes);
    }
  }
  return value;
}
// Two quarters of `a`, then two of `b`, two bits of `which` for each.
inline Emulated Quarters(Emulated a, Emulated b, int which) {
  Emulated value;
  for (int i = 0; i < 4; ++i) {
    const Emulated& from = i < 2 ? a : b;
    std::memcpy(value.at + 16 * i, from.at + 16 * (which >> 2 * i & 3), 16);
  }
  return value;
}

}  // namespace emulated

// Found in the library: this form was built, not another.
extern "C" const char effjax_emulated[] = "dpbusd_emulated";

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512VNNI__ 1
#define __m512i Emulated
#define _mm512_setzero_si512() emulated::Same8(0)
#define _mm512_loadu_si512 emulated::Load
#define _mm512_storeu_si512 emulated::Store
#define _mm512_set1_epi8 emulated::Same8
#define _mm512_set1_epi32 emulated::Same32
#define _mm512_xor_si512 emulated::Xor
#define _mm512_add_epi32 emulated::Add
#define _mm512_dpbusd_epi32 emulated::Dpbusd
#define _mm512_maskz_loadu_epi8 emulated::LoadSome
#define _mm512_unpacklo_epi32(a, b) emulated::Unpack(a, b, 4, 0)
#define _mm512_unpackhi_epi32(a, b) emulated::Unpack(a, b, 4, 1)
#define _mm512_unpacklo_epi64(a, b) emulated::Unpack(a, b, 8, 0)
#define _mm512_unpackhi_epi64(a, b) emulated::Unpack(a, b, 8, 1)
#define _mm512_shuffle_i32x4 emulated::Quarters
#define EFFJAX_KEEP_ORDER(vector)
