// Top-k, top-p and min-p by thresholds: no row is sorted. Same borders as truncate_logits in
// paceline_kernels/sampling.py. Included by kernels.cpp.
#pragma once

#include <algorithm>
#include <functional>
#include <utility>
#include <vector>

#include "simd.h"

namespace paceline {
namespace PACELINE_ISA {

inline f32x16 load_or(const float* p, int count, float fill) {
  if (count >= kLanes) return load(p);
  f32x16 v = splat(fill);
  std::memcpy(&v, p, sizeof(float) * count);
  return v;
}

constexpr int whole_lanes(int n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Some tokens of a row in ascending order. Behind the last one is room for 16 more.
struct Candidates {
  std::vector<int32_t> tokens;
  std::vector<float> values;
  int count = 0;

  void clear(int most) {
    if (int(values.size()) < most + kLanes) {
      tokens.resize(most + kLanes);
      values.resize(most + kLanes);
    }
    count = 0;
  }

  // Adds the lanes of v whose bit is set. May write over 16 lanes from the end on.
  void append(uint32_t bits, f32x16 v, i32x16 ids) {
#if defined(__AVX512F__)
    // Compressing into memory takes a hundred cycles on Zen 4; into a register, two.
    store(&values[count], (f32x16)_mm512_maskz_compress_ps(__mmask16(bits), (__m512)v));
    store_as(&tokens[count], _mm512_maskz_compress_epi32(__mmask16(bits), (__m512i)ids));
    count += __builtin_popcount(bits);
#else
    for (; bits; bits &= bits - 1) {
      values[count] = v[__builtin_ctz(bits)];
      tokens[count++] = ids[__builtin_ctz(bits)];
    }
#endif
  }

  // Makes the lanes behind the last one impossible.
  void pad() {
    store(&values[count], splat(-INFINITY));
    store_as(&tokens[count], i32x16{});
  }

  // Keeps the lanes that bits(v) sets.
  template <typename Bits>
  void filter(Bits&& bits) {
    const int all = count;
    count = 0;
    for (int i = 0; i < all; i += kLanes) {
      const f32x16 v = load(&values[i]);
      const uint32_t whole = all - i >= kLanes ? 0xFFFFu : (1u << (all - i)) - 1;
      append(bits(v) & whole, v, load_as<i32x16>(&tokens[i]));
    }
    pad();
  }
};

// Collects tokens of at least `threshold`.
inline void collect(const float* x, int n, float threshold, Candidates& out) {
  i32x16 ids = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  out.clear(n);
  for (int i = 0; i < n; i += kLanes, ids += kLanes) {
    const f32x16 v = load_or(x + i, n - i, NAN);
    const uint32_t bits = bits_where(v, [&](f32xn part) { return part >= threshold; });
    if (bits) out.append(bits, v, ids);
  }
  out.pad();
}

// The k-th largest of n >= k values, of which none is NaN. Keeps the k largest so far and up to
// as many newer ones that are larger than the least of them.
inline float kth_largest(const float* x, int n, int k, Candidates& scratch) {
  scratch.clear(n);
  const auto begin = scratch.values.begin();
  const int most = std::max(2 * k, k + 512);
  const auto shrink = [&] {
    std::nth_element(begin, begin + k - 1, begin + scratch.count, std::greater<float>());
    scratch.count = k;
    return begin[k - 1];
  };
  float floor = -INFINITY;
  for (int i = 0; i < n; i += kLanes) {
    const f32x16 v = load_or(x + i, n - i, -INFINITY);
    const uint32_t bits = bits_where(v, [&](f32xn part) { return part > floor; });
    if (!bits) continue;
    scratch.append(bits, v, i32x16{});
    if (scratch.count >= most) floor = shrink();
  }
  return scratch.count < k ? -INFINITY : shrink();
}

using f64xn = double __attribute__((vector_size(4 * kNative)));
using i64xn = int64_t __attribute__((vector_size(4 * kNative)));
constexpr int kDoubles = kNative / 2;

// e^x within 2 units in the last place for x <= 0; 0 below -700.
inline f64xn exp(f64xn x) {
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  const i64xn is_normal = x >= -700.0;
  x = (f64xn)((i64xn)x & is_normal);
  const f64xn shifted = x * 1.44269504088896340736 + kRound, n = shifted - kRound;
  // ln 2 in two parts (fdlibm e_exp.c): n times the first one is exact.
  const f64xn r = x - n * 6.93147180369123816490e-01 - n * 1.90821492927058770002e-10;
  // Taylor's series: the first term left out is below 2^-52 for |r| <= ln 2 / 2.
  f64xn p = 1.0 / 479001600 * r + 1.0 / 39916800;
  for (const double c : {1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720, 1.0 / 120,
                         1.0 / 24, 1.0 / 6, 1.0 / 2, 1.0, 1.0}) {
    p = p * r + c;
  }
  return (f64xn)(((i64xn)p + ((i64xn)shifted << 52)) & is_normal);
}

// Exponentials of some logits.
inline f64xn weights(const float* x) {
  using f32xh = float __attribute__((vector_size(2 * kNative)));
  return exp(__builtin_convertvector(load_as<f32xh>(x), f64xn));
}

// Sum of exponentials of whole lanes. What is left out, below e^-60, is less than any rounding.
inline double mass(const float* x, int n) {
  f64xn sums[2] = {};
  for (int i = 0; i < n; i += kLanes) {
    if (!bits_where(load(x + i), [](f32xn v) { return v > -60.0f; })) continue;
    for (int j = 0; j < kLanes; j += 2 * kDoubles) {
      sums[0] += weights(x + i + j);
      sums[1] += weights(x + i + j + kDoubles);
    }
  }
  double sum = 0;
  for (int i = 0; i < kDoubles; ++i) sum += sums[0][i] + sums[1][i];
  return sum;
}

// Where a nucleus ends: all above `value` are in it, and the first `ties` of those that have it.
struct NucleusEnd {
  float value;
  int ties;
};

// Sums below a share by less than this have reached it, so that rounding does not decide about
// shares that are reached exactly.
constexpr double kReached = 1e-13;

// Adds up the weights of keys that begin with `prefix`, by their next bits. As none of the values
// is above 0, the bits of their magnitude sort them: the best has key 0.
inline void add_weights(const Candidates& c, uint32_t prefix, int shift, int bits, double* sums) {
  const auto key = [](auto v) { return v & 0x7FFFFFFFu; };
  for (int i = 0; i < c.count; i += kLanes) {
    const float* x = &c.values[i];
    uint32_t left = bits_where(load(x), [&](f32xn v) {
      return (i32xn)(key((u32xn)v) >> (shift + bits) == prefix);
    });
    if (!left) continue;
    double all[kLanes];
    for (int j = 0; j < kLanes; j += kDoubles) store_as(all + j, weights(x + j));
    for (; left; left &= left - 1) {
      const int lane = __builtin_ctz(left);
      sums[key(load_as<uint32_t>(x + lane)) >> shift & ((1u << bits) - 1)] += all[lane];
    }
  }
}

// The end of the smallest set of likeliest candidates whose mass reaches `target`: a search by 11,
// 10 and 10 bits of their keys, from the best on.
inline NucleusEnd find_nucleus(const Candidates& c, double target) {
  uint32_t prefix = 0;
  double above = 0;
  for (const auto& [shift, bits] : {std::pair{20, 11}, std::pair{10, 10}, std::pair{0, 10}}) {
    double sums[1 << 11] = {};
    add_weights(c, prefix, shift, bits, sums);
    int bucket = 0, last = (1 << bits) - 1;
    while (last > 0 && sums[last] == 0.0) --last;
    for (; bucket < last && above + sums[bucket] < target; ++bucket) above += sums[bucket];
    prefix = prefix << bits | uint32_t(bucket);
  }
  const float value = -load_as<float>(&prefix);
  const double weight = exp(f64xn{} + double(value))[0];
  int ties = prefix == 0;
  while (ties < c.count && above + ties * weight < target) ++ties;
  return {value, ties};
}

}  // namespace PACELINE_ISA
}  // namespace paceline
