// Attention of up to 16 lanes at once: a lane is an element of every register.
//
// Scores are computed transposed, [context][16 lanes]: keys are read as they lie in their pages, the
// softmax works on whole registers, and lanes never mix.
#pragma once

#include "attention_parts.h"
#include "product.h"

namespace paceline {
namespace PACELINE_ISA {

constexpr int kParts = kLanes / kNative;  // registers of 16 lanes

// ---- float32 ---------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int kTokenRows = 16;
#elif defined(__AVX2__)
constexpr int kTokenRows = 4;
#else
constexpr int kTokenRows = 2;
#endif

// Calls with the distance between tokens as a constant for the usual head sizes: with it in the
// instructions a tile's 16 rows need one address instead of 16.
template <typename Call>
void with_stride(ptrdiff_t stride, Call&& call) {
  switch (stride) {
    case 64: return call(std::integral_constant<ptrdiff_t, 64>{});
    case 80: return call(std::integral_constant<ptrdiff_t, 80>{});
    case 96: return call(std::integral_constant<ptrdiff_t, 96>{});
    case 128: return call(std::integral_constant<ptrdiff_t, 128>{});
    case 256: return call(std::integral_constant<ptrdiff_t, 256>{});
    default: return call(stride);
  }
}

// scores[t] += q[k] * key[t][k] for all k, t in one tile of 16 keys.
template <typename Stride>
void scores_f32(const float* keys, Stride stride, const float* q, int size, float* scores,
                const uint8_t* ahead) {
  for (int t = 0; t < 16; t += kTokenRows) {
    f32xn acc[kTokenRows][kParts] = {};
    const float* key = keys + t * stride;
    for (int k = 0; k < size; ++k) {
      __builtin_prefetch(ahead + 64 * k);
      for (int n = 0; n < kParts; ++n) {
        const f32xn lanes = load_as<f32xn>(q + k * kLanes + n * kNative);
        for (int i = 0; i < kTokenRows; ++i) acc[i][n] += key[i * stride + k] * lanes;
      }
    }
    std::memcpy(scores + t * kLanes, acc, sizeof acc);
  }
}

// out[d] += value[t][d] * weights[t] over `tokens` rows of one tile of 16 values.
template <typename Stride>
void values_f32(const float* values, Stride stride, const float* weights, int tokens, int padded,
                float* out, const uint8_t* ahead) {
  for (int d = 0; d < padded; d += kTokenRows) {
    f32xn acc[kTokenRows][kParts];
    std::memcpy(acc, out + d * kLanes, sizeof acc);
    for (int t = 0; t < tokens; ++t) {
      __builtin_prefetch(ahead + 64 * (d + t));
      for (int n = 0; n < kParts; ++n) {
        const f32xn p = load_as<f32xn>(weights + t * kLanes + n * kNative);
        for (int i = 0; i < kTokenRows; ++i) acc[i][n] += values[t * stride + d + i] * p;
      }
    }
    std::memcpy(out + d * kLanes, acc, sizeof acc);
  }
}

// ---- bfloat16: pairs along the summed dimension, [pairs][16][2] ------------------------------

inline void scores_bf16(const uint8_t* keys, ptrdiff_t stride, const uint8_t* q, int size,
                        float* scores, const uint8_t* ahead) {
  for (int t = 0; t < 16; t += kTokenRows) {
    f32xn acc[kTokenRows][kParts] = {};
    const uint8_t* key = keys + t * stride;
    for (int k = 0; k < size / 2; ++k) {
      __builtin_prefetch(ahead + 64 * k);
      for (int n = 0; n < kParts; ++n) {
        const u32xn lanes = load_as<u32xn>(q + k * 64 + n * 4 * kNative);
        for (int i = 0; i < kTokenRows; ++i) {
          acc[i][n] = dot_pairs(acc[i][n], load_as<uint32_t>(key + i * stride + 4 * k), lanes);
        }
      }
    }
    std::memcpy(scores + t * kLanes, acc, sizeof acc);
  }
}

// `values` holds pairs of tokens, [pairs][Dp][2].
inline void values_bf16(const uint8_t* values, int pairs, const uint8_t* weights, int padded,
                        float* out, const Ahead& ahead) {
  for (int d = 0; d < padded; d += kTokenRows) {
    f32xn acc[kTokenRows][kParts];
    std::memcpy(acc, out + d * kLanes, sizeof acc);
    for (int t = 0; t < pairs; ++t) {
      __builtin_prefetch(ahead.values[t / 8] + 64 * (d / 2 + t % 8));
      const uint8_t* pair = values + (size_t(t) * padded + d) * 4;
      for (int n = 0; n < kParts; ++n) {
        const u32xn p = load_as<u32xn>(weights + t * 64 + n * 4 * kNative);
        for (int i = 0; i < kTokenRows; ++i) {
          acc[i][n] = dot_pairs(acc[i][n], load_as<uint32_t>(pair + 4 * i), p);
        }
      }
    }
    std::memcpy(out + d * kLanes, acc, sizeof acc);
  }
}

#if defined(__AMX_TILE__)

// scores [64][16] = keys [64][Dp] x queries [Dp/2][16][2].
inline void scores_amx(const KvBlock& block, const uint8_t* q, int padded, float* scores) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int k = 0; k < padded / 32; ++k) {
    _tile_loadd(6, q + k * 1024, 64);
    _tile_loadd(4, block.keys[0] + 64 * k, block.key_stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, block.keys[1] + 64 * k, block.key_stride);
    _tile_dpbf16ps(1, 5, 6);
    _tile_loadd(4, block.keys[2] + 64 * k, block.key_stride);
    _tile_dpbf16ps(2, 4, 6);
    _tile_loadd(5, block.keys[3] + 64 * k, block.key_stride);
    _tile_dpbf16ps(3, 5, 6);
  }
  _tile_stored(0, scores, 64);
  _tile_stored(1, scores + 256, 64);
  _tile_stored(2, scores + 512, 64);
  _tile_stored(3, scores + 768, 64);
}

// out [Dp][16] += values [Dp][64] x weights [32 pairs][16][2].
inline void values_amx(const uint8_t* values, const uint8_t* weights, int padded, float* out) {
  _tile_loadd(6, weights, 64);
  _tile_loadd(7, weights + 1024, 64);
  for (int d = 0; d < padded; d += 32) {
    _tile_loadd(0, out + d * kLanes, 64);
    _tile_loadd(4, values + d * 128, 128);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(1, out + (d + 16) * kLanes, 64);
    _tile_loadd(5, values + (d + 16) * 128, 128);
    _tile_dpbf16ps(1, 5, 6);
    _tile_loadd(4, values + d * 128 + 64, 128);
    _tile_dpbf16ps(0, 4, 7);
    _tile_loadd(5, values + (d + 16) * 128 + 64, 128);
    _tile_dpbf16ps(1, 5, 7);
    _tile_stored(0, out + d * kLanes, 64);
    _tile_stored(1, out + (d + 16) * kLanes, 64);
  }
}

#endif

// Values in the order of the product with weights, from the token `first` on as far as the product
// reads them; float32 is read in place.
inline void arrange_values(const KvBlock& block, int padded, int first, uint8_t* out) {
  const auto pair = [&](int p, int d) {
    const uint8_t* tile = block.values[p / 8] + (2 * p % 16) * block.key_stride + 2 * d;
    return interleave(load_as<u16x16>(tile), load_as<u16x16>(tile + block.key_stride));
  };
#if defined(__AMX_TILE__)
  for (int half = first / 32; half < 2; ++half) {
    for (int d = 0; d < padded; d += 16) {
      u32x16 rows[16];
      for (int p = 0; p < 16; ++p) rows[p] = pair(16 * half + p, d);
      transpose(rows);
      for (int i = 0; i < 16; ++i) store_as(out + (d + i) * 128 + 64 * half, rows[i]);
    }
  }
#else
  for (int p = first / 2; p < (block.tokens + 1) / 2; ++p) {
    for (int d = 0; d < padded; d += 16) {
      const u32x16 words = pair(p, d);
      std::memcpy(out + (size_t(p) * padded + d) * 4, &words, sizeof words);
    }
  }
#endif
}

// Updates a lane tile's state with the first `used` tokens of a block. Lanes beyond those in use
// compute harmless numbers.
template <bool kFetches, typename Mask>
void attend_block(const Context& c, const KvBlock& block, int used, const Ahead& ahead,
                  const uint8_t* q, const uint8_t* values,
                  bool is_masked, Mask&& seen, AttentionScratch& scratch, LaneState state) {
  const AttentionShape& s = c.shape;
  const int padded = padded_head(s);
  float* scores = scratch.scores.data();
  if (s.kv_type == Type::kF32) {
    for (int t = 0; t < used; t += 16) {
      with_stride(block.key_stride / 4, [&](auto stride) {
        scores_f32(reinterpret_cast<const float*>(block.keys[t / 16]), stride,
                   reinterpret_cast<const float*>(q), s.head_size, scores + t * kLanes,
                   ahead.keys[t / 16]);
      });
    }
  } else {
#if defined(__AMX_TILE__)
    scores_amx(block, q, padded, scores);
#else
    for (int t = 0; t < used; t += 16) {
      scores_bf16(block.keys[t / 16], block.key_stride, q, padded, scores + t * kLanes,
                  ahead.keys[t / 16]);
    }
#endif
  }
  // Tile products have no steps to fetch between; there the softmax does it, row by row.
  const auto fetch_row = [&](const uint8_t* const* tiles, int t) {
#if defined(__AMX_TILE__)
    const int bytes = kFetches ? s.head_size * 2 : 0;
    for (int i = 0; i < bytes; i += 64) __builtin_prefetch(tiles[t / 16] + t % 16 * bytes + i);
#else
    (void)tiles, (void)t;
#endif
  };
  f32x16 top = splat(kNever);
  for (int t = 0; t < used; ++t) {
    f32x16 x = load(scores + t * kLanes);
    fetch_row(ahead.keys, t);
    if (is_masked) {
      x = seen(t) ? x : splat(kNever);
      store(scores + t * kLanes, x);
    }
    top = max(top, x);
  }
  const float scale = s.scale * kLog2E;
  const auto [base, shrink] = rescale(state, top, scale);
  f32x16 runs[4] = {};
  const auto weight = [&](int t, int run) {
    const f32x16 p = t < used ? exp2((load(scores + t * kLanes) - base) * scale) : f32x16{};
    runs[run] += p;
    return p;
  };
  uint8_t* weights = scratch.weights.data();
#if defined(__AMX_TILE__)
  const int stop = s.kv_type == Type::kF32 ? used : kKvBlock;
#else
  const int stop = used;
#endif
  for (int t = 0; t < stop; t += 4) {
    const f32x16 p[4] = {weight(t, 0), weight(t + 1, 1), weight(t + 2, 2), weight(t + 3, 3)};
    for (int i = 0; i < 4; ++i) fetch_row(ahead.values, t + i);
    if (s.kv_type == Type::kF32) {
      std::memcpy(weights + t * 64, p, sizeof p);
    } else {
      const u32x16 words[2] = {interleave(to_bf16(p[0]), to_bf16(p[1])),
                               interleave(to_bf16(p[2]), to_bf16(p[3]))};
      std::memcpy(weights + t * 32, words, sizeof words);
    }
  }
  store(state.sum, add_up(state, shrink, runs));
  if (any(shrink != 1.0f)) {
    for (int d = 0; d < padded; ++d) {
      store(state.values + d * kLanes, load(state.values + d * kLanes) * shrink);
    }
  }
  if (s.kv_type == Type::kF32) {
    for (int t = 0; t < used; t += 16) {
      const int count = used - t < 16 ? used - t : 16;
      with_stride(block.key_stride / 4, [&](auto stride) {
        values_f32(reinterpret_cast<const float*>(block.values[t / 16]), stride,
                   reinterpret_cast<const float*>(weights) + t * kLanes, count, padded,
                   state.values, ahead.values[t / 16]);
      });
    }
  } else {
#if defined(__AMX_TILE__)
    values_amx(values, weights, padded, state.values);
#else
    values_bf16(values, (used + 1) / 2, weights, padded, state.values, ahead);
#endif
  }
}

// ---- queries and results ----------------------------------------------------------------------

// Queries in the order of the product with keys: [Dp][16], or [Dp / 2][16][2] for bf16.
inline void pack_queries(const Context& c, const LaneTile& tile, const float* q, ptrdiff_t q_stride,
                         uint8_t* out) {
  const AttentionShape& s = c.shape;
  const int padded = padded_head(s);
  const float* lanes[kLanes] = {};
  for (int i = 0; i < tile.count; ++i) lanes[i] = q + lane_offset(c, tile, i, q_stride);
  const auto part = [&](int i, int d) {
    const int n = s.head_size - d < kLanes ? s.head_size - d : kLanes;
    return lanes[i] && n > 0 ? load_lanes(lanes[i] + d, n) : f32x16{};
  };
  const int step = s.kv_type == Type::kF32 ? 16 : 32;
  for (int d = 0; d < padded; d += step, out += 16 * 64) {
    u32x16 rows[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      if (s.kv_type == Type::kF32) {
        rows[i] = (u32x16)part(i, d);
      } else {
        const u16x16 halves[2] = {to_bf16(part(i, d)), to_bf16(part(i, d + 16))};
        std::memcpy(&rows[i], halves, sizeof halves);
      }
    }
    transpose(rows);
    for (int i = 0; i < kLanes; ++i) store_as(out + 64 * i, rows[i]);
  }
}

inline void write_lanes(const Context& c, const LaneTile& tile, LaneState state, float* out,
                        ptrdiff_t out_stride) {
  const int size = c.shape.head_size;
  const f32x16 inverse = 1.0f / load(state.sum);
  for (int d = 0; d < size; d += kLanes) {
    u32x16 rows[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      rows[i] = (u32x16)(load(state.values + (d + i) * kLanes) * inverse);
    }
    transpose(rows);
    const int n = size - d < kLanes ? size - d : kLanes;
    for (int i = 0; i < tile.count; ++i) {
      store_lanes(out + lane_offset(c, tile, i, out_stride) + d, (f32x16)rows[i], n);
    }
  }
}

}  // namespace PACELINE_ISA
}  // namespace paceline
