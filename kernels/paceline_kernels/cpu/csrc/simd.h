// Sixteen lanes in GNU vector extensions: one source for every instruction set.
//
// The compiler lowers them to one 512-bit, two 256-bit or four 128-bit operations. Included by
// kernels.cpp only, which is compiled once per instruction set; everything lives in a namespace
// of its own so that the linker never mixes two of them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace paceline {
namespace PACELINE_ISA {

using f32x16 = float __attribute__((vector_size(64)));
using i32x16 = int32_t __attribute__((vector_size(64)));
using u32x16 = uint32_t __attribute__((vector_size(64)));
using u16x16 = uint16_t __attribute__((vector_size(32)));

constexpr int kLanes = 16;

// One register. Loops that keep many sums use these: wider vectors would be kept in memory.
#if defined(__AVX512F__)
constexpr int kNative = 16;
#elif defined(__AVX2__)
constexpr int kNative = 8;
#else
constexpr int kNative = 4;
#endif
using f32xn = float __attribute__((vector_size(4 * kNative)));
using i32xn = int32_t __attribute__((vector_size(4 * kNative)));
using u32xn = uint32_t __attribute__((vector_size(4 * kNative)));

template <typename V>
V load_as(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <typename V>
void store_as(void* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

// acc + the products of two pairs of bf16: of the first ones, then of the second ones.
inline f32xn dot_pairs(f32xn acc, uint32_t pair, u32xn pairs) {
#if defined(__AVX512BF16__)
  // As an intrinsic, GCC 12 keeps copies of the sums and spills them.
  asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(_mm512_set1_epi32(int32_t(pair))), "v"(pairs));
  return acc;
#else
  const uint32_t low = pair << 16, high = pair & 0xFFFF0000u;
  acc += load_as<float>(&low) * (f32xn)(pairs << 16);
  return acc + load_as<float>(&high) * (f32xn)(pairs & 0xFFFF0000u);
#endif
}

// VNNI multiplies unsigned bytes by signed ones: tokens' int8 values are kept 128 higher, and what
// that adds, 128 * sum(w), is taken off at the end.
#if defined(__AVX512VNNI__) && !defined(__AMX_TILE__)
constexpr int kI8Offset = 128;
#else
constexpr int kI8Offset = 0;
#endif

inline f32x16 load(const float* p) {
  f32x16 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, f32x16 v) { std::memcpy(p, &v, sizeof v); }

inline f32x16 load_part(const float* p, int count) {
  f32x16 v = {};
  std::memcpy(&v, p, sizeof(float) * count);
  return v;
}

inline void store_part(float* p, f32x16 v, int count) { std::memcpy(p, &v, sizeof(float) * count); }

// Rows become columns.
inline void transpose(u32x16 m[16]) {
#if defined(__AVX512F__)
  __m512i r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = (__m512i)m[i];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xDD);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xDD);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xDD);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xDD);
  }
  for (int i = 0; i < 16; ++i) m[i] = (u32x16)r[i];
#else
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < i; ++j) {
      const uint32_t held = m[i][j];
      m[i][j] = m[j][i];
      m[j][i] = held;
    }
  }
#endif
}

inline f32x16 splat(float x) { return x - f32x16{}; }

// A NaN in `b` survives both.
inline f32x16 max(f32x16 a, f32x16 b) { return a > b ? a : b; }
inline f32x16 min(f32x16 a, f32x16 b) { return a < b ? a : b; }

inline float sum(f32x16 v) {
  // In one fixed order, whatever the width of the machine.
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) v[i] += v[i + width];
  }
  return v[0];
}

inline float largest(f32x16 v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = best > v[i] ? best : v[i];
  return best;
#endif
}

// 2^x within 2 units in the last place for x in [-126, 127]; 0 far below, NaN stays NaN.
// Polynomial of Cephes' exp2f (Moshier 1989) on [-0.5, 0.5].
inline f32x16 exp2(f32x16 x) {
#if defined(__AVX512F__)
  // Results that are not normal numbers cost hundreds of cycles each; they are masked to 0.
  const __mmask16 is_kept = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  const f32x16 n = (f32x16)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#else
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the integer in the bits
  const i32x16 is_tiny = x < -126.0f;
  x = x > 127.0f ? splat(127.0f) : x;
  const f32x16 shifted = x + kRound, n = shifted - kRound;
#endif
  const f32x16 f = x - n;
  f32x16 p = 1.535336188319500e-4f * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.0f;
#if defined(__AVX512F__)
  return (f32x16)_mm512_maskz_scalef_ps(is_kept, (__m512)p, (__m512)n);
#else
  const i32x16 exponent = ((i32x16)shifted - (i32x16)splat(kRound)) << 23;
  const f32x16 scaled = (f32x16)((i32x16)p + exponent);
  // Adding to the exponent of a NaN could make it a number.
  const f32x16 result = x == x ? scaled : x;
  return is_tiny ? f32x16{} : result;
#endif
}

inline bool any(i32x16 mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#else
  int32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= mask[i];
  return found != 0;
#endif
}

// One bit per lane of a mask.
inline uint32_t bits_of(i32xn mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#elif defined(__AVX2__)
  return uint32_t(_mm256_movemask_ps((__m256)mask));
#elif defined(__SSE2__)
  return uint32_t(_mm_movemask_ps((__m128)mask));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kNative; ++i) bits |= (mask[i] != 0 ? 1u : 0u) << i;
  return bits;
#endif
}

// One bit for each of 16 lanes for which is_true(lanes of a register) holds. GCC 12 compares
// vectors wider than a register lane by lane.
template <typename IsTrue>
uint32_t bits_where(f32x16 v, IsTrue&& is_true) {
  f32xn parts[kLanes / kNative];
  std::memcpy(parts, &v, sizeof parts);
  uint32_t bits = 0;
  for (int i = 0; i < kLanes / kNative; ++i) bits |= bits_of(is_true(parts[i])) << (i * kNative);
  return bits;
}

constexpr float kLog2E = 1.44269504088896341f;

inline f32x16 silu(f32x16 x) { return x / (1.0f + exp2(x * -kLog2E)); }

// Upper halves of float32, rounded to nearest even.
inline u16x16 to_bf16(f32x16 x) {
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh((__m512)x);
  u16x16 out;
  std::memcpy(&out, &h, sizeof out);
  return out;
#else
  const u32x16 bits = (u32x16)x;
  const u32x16 rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
  const u32x16 kept = x == x ? rounded : (bits | 0x400000u);
  return __builtin_convertvector(kept >> 16, u16x16);
#endif
}

inline u32x16 widen_words(u16x16 h) {
#if defined(__AVX512F__)
  return (u32x16)_mm512_cvtepu16_epi32((__m256i)h);
#else
  return __builtin_convertvector(h, u32x16);
#endif
}

inline f32x16 from_bf16(const uint16_t* p) {
  u16x16 h;
  std::memcpy(&h, p, sizeof h);
  return (f32x16)(widen_words(h) << 16);
}

inline f32x16 from_bf16_part(const uint16_t* p, int count) {
  u16x16 h = {};
  std::memcpy(&h, p, sizeof(uint16_t) * count);
  return (f32x16)(widen_words(h) << 16);
}

}  // namespace PACELINE_ISA
}  // namespace paceline
