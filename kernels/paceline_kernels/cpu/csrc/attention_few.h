// Attention of a decoding row: few lanes, so it is the context that fills the registers.
//
// Keys are transposed on the way, [D][16 tokens], and every lane multiplies them by its own query.
// Each number is what attention_wide.h computes, to the last bit.
#pragma once

#include "attention_parts.h"
#include "product.h"

namespace paceline {
namespace PACELINE_ISA {

// More lanes than this are many. Without 512-bit registers transposing costs too much, and tile
// products of bf16 do not sum in this order.
#if defined(__AMX_TILE__)
constexpr int few_lanes(Type kv_type) { return kv_type == Type::kF32 ? 8 : 0; }
#elif defined(__AVX512F__)
constexpr int few_lanes(Type) { return 8; }
#else
constexpr int few_lanes(Type) { return 0; }
#endif

// Words of 4 bytes that hold a head's features.
inline int head_words(const AttentionShape& s) {
  return padded_head(s) * bytes_of(s.kv_type) / 4;
}

template <Type kType>
f32x16 multiply_add(f32x16 acc, uint32_t one, u32x16 many) {
#if defined(__AVX512F__)
  if constexpr (kType == Type::kBF16) return dot_pairs(acc, one, many);
#endif
  return acc + load_as<float>(&one) * (f32x16)many;
}

// scores[l][t] = query l x key t for one tile of 16 keys.
template <Type kType, int L>
void few_scores(const uint8_t* keys, ptrdiff_t stride, const uint32_t* q, int words, float* scores,
                const uint8_t* ahead) {
  f32x16 acc[L] = {};
  for (int w = 0; w < words; w += 16) {
    u32x16 features[16];
    for (int t = 0; t < 16; ++t) features[t] = load_as<u32x16>(keys + t * stride + 4 * w);
    transpose(features);
#pragma GCC unroll 16
    for (int k = 0; k < 16; ++k) {
      __builtin_prefetch(ahead + 64 * (w + k), 0, 2);
      for (int l = 0; l < L; ++l) {
        acc[l] = multiply_add<kType>(acc[l], q[l * words + w + k], features[k]);
      }
    }
  }
  for (int l = 0; l < L; ++l) store(scores + l * kKvBlock, acc[l]);
}

// out[l][d] += weight of lane l x value [d] over the tokens of a block, for C registers of features.
template <Type kType, int L, int C>
void few_values(const KvBlock& block, int used, const uint32_t* weights, int d, int padded,
                float* out, const Ahead& ahead) {
  constexpr int kTokens = kType == Type::kF32 ? 1 : 2, kWords = kKvBlock / kTokens;
  f32x16 acc[L][C];
  for (int l = 0; l < L; ++l) {
    for (int i = 0; i < C; ++i) acc[l][i] = load(out + l * padded + d + i * kLanes);
  }
  for (int t = 0; t < used; t += kTokens) {
    const uint8_t* row = block.values[t / 16] + t % 16 * block.key_stride + d * bytes_of(kType);
    const int line = (t % 16 * padded + d) * bytes_of(kType) / 64;
    for (int i = 0; i < C; ++i) {
      __builtin_prefetch(ahead.values[t / 16] + 64 * (line + i), 0, 2);
      u32x16 words;
      if constexpr (kType == Type::kF32) {
        words = load_as<u32x16>(row + 64 * i);
      } else {
        words = interleave(load_as<u16x16>(row + 32 * i),
                           load_as<u16x16>(row + block.key_stride + 32 * i));
      }
      for (int l = 0; l < L; ++l) {
        acc[l][i] = multiply_add<kType>(acc[l][i], weights[l * kWords + t / kTokens], words);
      }
    }
  }
  for (int l = 0; l < L; ++l) {
    for (int i = 0; i < C; ++i) store(out + l * padded + d + i * kLanes, acc[l][i]);
  }
}

// Exponentials of one lane's scores, as the product with values reads them, and their four runs.
template <Type kType>
void few_weights(const float* scores, int tiles, float base, float scale, uint8_t* out,
                 float runs[4]) {
  using f32x4 = float __attribute__((vector_size(16)));
  f32x4 sums = {};
  for (int g = 0; g < tiles; ++g) {
    const f32x16 p = exp2((load(scores + 16 * g) - base) * scale);
    for (int i = 0; i < 4; ++i) sums += load_as<f32x4>(reinterpret_cast<const char*>(&p) + 16 * i);
    if constexpr (kType == Type::kF32) {
      store_as(out + 64 * g, p);
    } else {
      store_as(out + 32 * g, to_bf16(p));
    }
  }
  std::memcpy(runs, &sums, sizeof sums);
}

// Updates the states of a tile's L lanes with the first `used` tokens of the block at `at`.
template <Type kType, int L>
void attend_few(const Context& c, const LaneTile& tile, const KvBlock& block, int at, int used,
                int window, bool is_masked, const Ahead& ahead, const uint8_t* q,
                AttentionScratch& scratch, LaneState state) {
  const int padded = padded_head(c.shape), words = head_words(c.shape);
  const int tiles = (used + 15) / 16;
  float* scores = scratch.scores.data();
  for (int g = 0; g < tiles; ++g) {
    few_scores<kType, L>(block.keys[g], block.key_stride, reinterpret_cast<const uint32_t*>(q),
                         words, scores + 16 * g, ahead.keys[g]);
  }
  alignas(64) float top[kLanes], runs[4][kLanes] = {};
  store(top, splat(kNever));
  for (int l = 0; l < L; ++l) {
    f32x16 most = splat(kNever);
    for (int g = 0; g < tiles; ++g) {
      f32x16 x = load(scores + l * kKvBlock + 16 * g);
      if (is_masked || 16 * g + 16 > used) {
        i32x16 token;
        for (int i = 0; i < kLanes; ++i) token[i] = at + 16 * g + i;
        const int position = tile.position[l];
        const i32x16 seen = (token < at + used) & (token <= position) & (token > position - window);
        x = seen ? x : splat(kNever);
        store(scores + l * kKvBlock + 16 * g, x);
      }
      most = max(most, x);
    }
    top[l] = largest(most);
  }
  const float scale = c.shape.scale * kLog2E;
  const auto [base, shrink] = rescale(state, load(top), scale);
  uint8_t* weights = scratch.weights.data();
  constexpr int kWeightBytes = kKvBlock * bytes_of(kType);
  for (int l = 0; l < L; ++l) {
    float sums[4];
    few_weights<kType>(scores + l * kKvBlock, tiles, base[l], scale, weights + l * kWeightBytes,
                       sums);
    for (int i = 0; i < 4; ++i) runs[i][l] = sums[i];
  }
  const f32x16 loaded[4] = {load(runs[0]), load(runs[1]), load(runs[2]), load(runs[3])};
  store(state.sum, add_up(state, shrink, loaded));
  if (any(shrink != 1.0f)) {
    for (int l = 0; l < L; ++l) {
      for (int d = 0; d < padded; d += kLanes) {
        float* v = state.values + l * padded + d;
        store(v, load(v) * shrink[l]);
      }
    }
  }
  constexpr int kColumnsAtOnce = L <= 4 ? 4 : 2;
  int d = 0;
  for (; d + kColumnsAtOnce * kLanes <= padded; d += kColumnsAtOnce * kLanes) {
    few_values<kType, L, kColumnsAtOnce>(block, used, reinterpret_cast<const uint32_t*>(weights), d,
                                         padded, state.values, ahead);
  }
  for (; d < padded; d += kLanes) {
    few_values<kType, L, 1>(block, used, reinterpret_cast<const uint32_t*>(weights), d, padded,
                            state.values, ahead);
  }
}

template <Type kType>
void attend_few_lanes(const Context& c, const LaneTile& tile, const KvBlock& block, int at, int used,
                      int window, bool is_masked, const Ahead& ahead, const uint8_t* q,
                      AttentionScratch& scratch, LaneState state) {
  if constexpr (few_lanes(kType) > 0) {
    with_rows<few_lanes(kType)>(tile.count, [&](auto count) {
      attend_few<kType, decltype(count)::value>(c, tile, block, at, used, window, is_masked, ahead,
                                                q, scratch, state);
    });
  }
}

// ---- queries and results ---------------------------------------------------------------------

// Queries in the KV's type, [lanes][Dp].
inline void pack_few(const Context& c, const LaneTile& tile, const float* q, ptrdiff_t q_stride,
                     uint8_t* out) {
  const int padded = padded_head(c.shape), size = c.shape.head_size;
  std::memset(out, 0, size_t(tile.count) * padded * c.element());
  for (int i = 0; i < tile.count; ++i, out += padded * c.element()) {
    store_kv(q + lane_offset(c, tile, i, q_stride), size, c.shape.kv_type, out);
  }
}

inline void write_few(const Context& c, const LaneTile& tile, LaneState state, float* out,
                      ptrdiff_t out_stride) {
  const int padded = padded_head(c.shape), size = c.shape.head_size;
  const f32x16 inverse = 1.0f / load(state.sum);
  for (int i = 0; i < tile.count; ++i) {
    float* to = out + lane_offset(c, tile, i, out_stride);
    for_lanes(size, [&](int d, int n) {
      store_lanes(to + d, load(state.values + i * padded + d) * inverse[i], n);
    });
  }
}

}  // namespace PACELINE_ISA
}  // namespace paceline
