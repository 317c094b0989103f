// Work on single tokens: normalisation, conversion to operands, rotary embedding, KV writes.
#pragma once

#include "simd.h"
#include "types.h"

namespace paceline {
namespace PACELINE_ISA {

// Calls body(first, count) for every 16 of n; count is below 16 at most once, at the end.
template <typename Body>
void for_lanes(int n, Body&& body) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, kLanes);
  if (i < n) body(i, n - i);
}

inline f32x16 load_lanes(const float* p, int count) {
  return count == kLanes ? load(p) : load_part(p, count);
}

inline void store_lanes(float* p, f32x16 v, int count) {
  count == kLanes ? store(p, v) : store_part(p, v, count);
}

// 1 / root mean square, in float32 (Zhang and Sennrich 2019, eq. 4).
inline float inverse_rms(const float* x, int size, float eps) {
  f32x16 squares = {};
  for_lanes(size, [&](int i, int n) {
    const f32x16 v = load_lanes(x + i, n);
    squares += v * v;
  });
  return 1.0f / std::sqrt(sum(squares) / float(size) + eps);
}

inline void rms_norm(const float* x, const float* weight, float eps, int size, float* out) {
  const float inverse = inverse_rms(x, size, eps);
  for_lanes(size, [&](int i, int n) {
    store_lanes(out + i, load_lanes(weight + i, n) * (load_lanes(x + i, n) * inverse), n);
  });
}

// Writes one row of a product's left operand: x, or its normalisation if there is a weight.
// int8 is symmetric with one scale per row: q = round(x / scale) + kI8Offset, scale = max |x| / 127.
inline void prepare_row(Type type, const float* x, const float* norm_weight, float eps, int size,
                        int padded, uint8_t* out, float* scale) {
  const float inverse = norm_weight ? inverse_rms(x, size, eps) : 1.0f;
  const auto value = [&](int i, int n) {
    const f32x16 v = load_lanes(x + i, n);
    return norm_weight ? load_lanes(norm_weight + i, n) * (v * inverse) : v;
  };
  if (type == Type::kF32) {
    float* to = reinterpret_cast<float*>(out);
    for_lanes(size, [&](int i, int n) { store_lanes(to + i, value(i, n), n); });
  } else if (type == Type::kBF16) {
    for_lanes(size, [&](int i, int n) {
      const u16x16 v = to_bf16(value(i, n));
      std::memcpy(out + 2 * i, &v, 2 * n);
    });
    std::memset(out + 2 * size, 0, 2 * (padded - size));
  } else {
    f32x16 most = {}, is_finite = {};
    for_lanes(size, [&](int i, int n) {
      const f32x16 v = value(i, n);
      most = max(v < 0.0f ? -v : v, most);
      is_finite += v * 0.0f;
    });
    // A row that is not finite has no scale: its results are NaN, other rows' are as they are.
    const float bound = sum(is_finite) == 0.0f ? largest(most) : 0.0f;
    *scale = sum(is_finite) == 0.0f ? bound / 127.0f : NAN;
    const float factor = bound > 0.0f ? 127.0f / bound : 0.0f;
    constexpr float kRound = 12582912.0f;
    for_lanes(size, [&](int i, int n) {
      const f32x16 shifted = value(i, n) * factor + kRound;
      const i32x16 q = (i32x16)shifted - (i32x16)splat(kRound) + kI8Offset;
      using u8x16 = uint8_t __attribute__((vector_size(16)));
      const u8x16 v = __builtin_convertvector(q, u8x16);
      std::memcpy(out + i, &v, n);
    });
    std::memset(out + size, 0, padded - size);
  }
}

// Rotates a head by position, halves paired (Su et al. 2021; GPT-NeoX layout). `table` holds
// head_size cosines and head_size sines of the position.
inline void rotate(float* x, const float* table, int head_size) {
  const int half = head_size / 2;
  for_lanes(half, [&](int i, int n) {
    const f32x16 first = load_lanes(x + i, n), second = load_lanes(x + half + i, n);
    const f32x16 cos0 = load_lanes(table + i, n), cos1 = load_lanes(table + half + i, n);
    const f32x16 sin0 = load_lanes(table + head_size + i, n);
    const f32x16 sin1 = load_lanes(table + head_size + half + i, n);
    store_lanes(x + i, first * cos0 - second * sin0, n);
    store_lanes(x + half + i, second * cos1 + first * sin1, n);
  });
}

inline void store_kv(const float* x, int size, Type type, uint8_t* out) {
  if (type == Type::kF32) {
    std::memcpy(out, x, sizeof(float) * size);
  } else {
    for_lanes(size, [&](int i, int n) {
      const u16x16 v = to_bf16(load_lanes(x + i, n));
      std::memcpy(out + 2 * i, &v, 2 * n);
    });
  }
}

inline float half_to_float(uint16_t h) {
  _Float16 v;
  std::memcpy(&v, &h, sizeof v);
  return float(v);
}

// Reads a row of a checkpoint's tensor.
inline void widen(const uint8_t* row, Type type, int size, float* out) {
  const uint16_t* half = reinterpret_cast<const uint16_t*>(row);
  if (type == Type::kF32) {
    std::memcpy(out, row, sizeof(float) * size);
  } else if (type == Type::kBF16) {
    for_lanes(size, [&](int i, int n) {
      store_lanes(out + i, n == kLanes ? from_bf16(half + i) : from_bf16_part(half + i, n), n);
    });
  } else {
    for (int i = 0; i < size; ++i) out[i] = half_to_float(half[i]);
  }
}

}  // namespace PACELINE_ISA
}  // namespace paceline
