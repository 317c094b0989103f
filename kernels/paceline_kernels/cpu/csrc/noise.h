// Gumbel noise from Philox4x32-10 (Salmon et al. 2011), and the race of noisy logits.
//
// A token's noise depends on seed, stream, position, lane and token alone, as in
// paceline_kernels/sampling.py. Logits here are shifted so that the best token's is 0. Included by
// kernels.cpp.
#pragma once

#include "simd.h"

namespace paceline {
namespace PACELINE_ISA {

constexpr int kWide = kNative / 2;
using u64xn = uint64_t __attribute__((vector_size(8 * kWide)));

struct NoiseKey {
  uint64_t seed;
  uint32_t stream;
  uint32_t position;
  uint32_t lane = 0;  // 0: the target's draws
};

// Products of lanes' lower halves.
inline u64xn product_of_low(u64xn a, u64xn b) {
#if defined(__AVX512F__)
  return (u64xn)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (u64xn)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (u64xn)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

// The four words of each group of tokens, in the lower halves of lanes; upper halves are garbage,
// which products and later rounds do not read.
struct Words {
  u64xn c0, c1, c2, c3;
};

inline Words philox(const NoiseKey& key, u64xn groups) {
  const u64xn m0 = u64xn{} + 0xD2511F53u, m1 = u64xn{} + 0xCD9E8D57u;
  uint32_t k0 = uint32_t(key.seed), k1 = uint32_t(key.seed >> 32);
  Words w{groups, u64xn{} + key.position, u64xn{} + key.stream, u64xn{} + key.lane};
  for (int round = 0; round < 10; ++round) {
    const u64xn product0 = product_of_low(w.c0, m0), product1 = product_of_low(w.c2, m1);
    w = {(product1 >> 32) ^ w.c1 ^ uint64_t(k0), product1, (product0 >> 32) ^ w.c3 ^ uint64_t(k1),
         product0};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return w;
}

// Tokens whose noise is made together.
constexpr int kNoiseBlock = 64;

// Groups of the lanes, so that interleaving even and odd lanes brings them into order.
inline u64xn lane_groups() {
  u64xn groups;
  for (int i = 0; i < kWide; ++i) groups[i] = uint64_t(i % 2 * (kWide / 2) + i / 2);
  return groups;
}

// out = a0 b0 a2 b2 ..., a1 b1 a3 b3 ...
inline void interleave(u64xn a, u64xn b, uint32_t* out) {
#if defined(__AVX512F__)
  store_as(out, _mm512_unpacklo_epi64((__m512i)a, (__m512i)b));
  store_as(out + 16, _mm512_unpackhi_epi64((__m512i)a, (__m512i)b));
#elif defined(__AVX2__)
  store_as(out, _mm256_unpacklo_epi64((__m256i)a, (__m256i)b));
  store_as(out + 8, _mm256_unpackhi_epi64((__m256i)a, (__m256i)b));
#else
  const uint64_t pairs[4] = {a[0], b[0], a[1], b[1]};
  std::memcpy(out, pairs, sizeof pairs);
#endif
}

// Words of kNoiseBlock tokens from `first` on; `first` is a multiple of it.
inline void words_of_block(const NoiseKey& key, int first, uint32_t* out) {
  constexpr uint64_t kLow = 0xFFFFFFFFu;
  const u64xn lanes = lane_groups();
  for (int i = 0; i < kNoiseBlock; i += 4 * kWide) {
    const Words w = philox(key, lanes + uint64_t((first + i) / 4));
    interleave((w.c0 & kLow) | (w.c1 << 32), (w.c2 & kLow) | (w.c3 << 32), out + i);
  }
}

// Words of any 16 tokens.
inline void words_of(const NoiseKey& key, const int32_t* tokens, uint32_t* out) {
  for (int i = 0; i < kLanes; i += kWide) {
    u64xn groups;
    for (int j = 0; j < kWide; ++j) groups[j] = uint32_t(tokens[i + j]) / 4;
    const Words w = philox(key, groups);
    uint64_t lanes[4][kWide];
    std::memcpy(lanes, &w, sizeof lanes);
    for (int j = 0; j < kWide; ++j) out[i + j] = uint32_t(lanes[tokens[i + j] % 4][j]);
  }
}

// In double precision like torch's, so that float32 noise is the same.
inline float gumbel(uint32_t word) {
  return float(-std::log(-std::log((double(word) + 0.5) * 0x1p-32)));
}

// No noise is larger: -log(-log(1 - 2^-33)) = 22.874.
constexpr float kMostNoise = 22.88f;

// At least x + noise. With v = 1 - u, -log(-log(u)) <= -log(v); and a float's bits read as a
// fixed-point number are at most its logarithm. Rounding of all this is below 1e-4.
inline f32xn most_noisy(f32xn x, u32xn words) {
  constexpr float kLn2 = 0.693147180559945f;
  const f32xn v = __builtin_convertvector((i32xn)(~words >> 1), f32xn) + 0.25f;  // times 2^31
  return x + ((127 + 31) * kLn2 + 1e-3f) -
         __builtin_convertvector((i32xn)v, f32xn) * (kLn2 * 0x1p-23f);
}

// Of equal values the lower token leads.
struct Leader {
  float value;
  int token;

  void offer(float noisy, int other) {
    if (noisy > value || (noisy == value && other < token)) *this = {noisy, other};
  }
};

// Lets 16 tokens try; logarithms are taken only of those that may lead.
template <typename TokenOf>
void offer_lanes(Leader& leader, const float* x, const uint32_t* words, TokenOf&& token_of) {
  for (int i = 0; i < kLanes; i += kNative) {
    const f32xn bound = most_noisy(load_as<f32xn>(x + i), load_as<u32xn>(words + i));
    for (uint32_t left = bits_of(bound >= leader.value); left; left &= left - 1) {
      const int lane = i + __builtin_ctz(left);
      leader.offer(x[lane] + gumbel(words[lane]), token_of(lane));
    }
  }
}

// Whether the largest noise would bring any of 16 tokens forward.
inline bool may_lead(f32x16 x, const Leader& leader) {
  const float least = leader.value - kMostNoise;
  return bits_where(x, [&](f32xn v) { return v >= least; }) != 0;
}

}  // namespace PACELINE_ISA
}  // namespace paceline
