// Attention of up to 16 lanes at a time over paged KV, in one pass (Dao et al. 2022, alg. 1).
//
// Scores are computed transposed, [context][16 lanes]: keys are read as they lie in their pages,
// the softmax works on whole registers, and lanes never mix. Context is taken in blocks of 64 and
// summed up in splits of 256, both counted from its start; so a query's result depends neither
// on its neighbours, nor on whether it was computed in a prompt or by itself.
#pragma once

#include <vector>

#include "product.h"
#include "rows.h"

namespace paceline {
namespace PACELINE_ISA {

constexpr float kNever = -INFINITY;

// One block of context, ready to be read: pointers to tiles of 16 keys, and values in the order
// of the backend's product.
struct KvBlock {
  const uint8_t* keys[kKvBlock / 16];
  ptrdiff_t key_stride;              // bytes from token to token
  const uint8_t* values[kKvBlock / 16];
  int tokens;                        // valid ones
};

inline int padded_head(const AttentionShape& shape) {
  return round_up(shape.head_size, shape.kv_type == Type::kF32 ? 16 : 32);
}

inline size_t state_floats(int padded) { return size_t(2 + padded) * kLanes; }

inline LaneState state_at(float* p) { return {p, p + kLanes, p + 2 * kLanes}; }

inline void clear(LaneState s, int padded) {
  store(s.largest, splat(kNever));
  std::memset(s.sum, 0, sizeof(float) * kLanes * (1 + padded));
}

// Adds what is known of more context to what is known of the context before it.
inline void merge(LaneState into, LaneState more, float exponent_scale, int padded) {
  const f32x16 m0 = load(into.largest), m1 = load(more.largest), m = max(m0, m1);
  // Before anything was seen both are -inf, and their difference would be NaN.
  const f32x16 base = m == kNever ? f32x16{} : m;
  const f32x16 a = exp2((m0 - base) * exponent_scale), b = exp2((m1 - base) * exponent_scale);
  store(into.largest, m);
  store(into.sum, load(into.sum) * a + load(more.sum) * b);
  for (int d = 0; d < padded; ++d) {
    float* v = into.values + d * kLanes;
    store(v, load(v) * a + load(more.values + d * kLanes) * b);
  }
}

#if defined(__AMX_TILE__)

// All tiles are 16 x 64 bytes here.
inline void configure_attention_tiles() { configure_tiles(16); }

#endif

struct Context {
  const AttentionShape& shape;
  const Pages& pages;
  const Batch& batch;
  int row;

  int element() const { return bytes_of(shape.kv_type); }
  const uint8_t* token(int at, int kv_head, bool is_value) const {
    const int32_t page = batch.tables[int64_t(row) * batch.table_width + at / shape.block_size];
    const int64_t head = (is_value ? shape.kv_heads : 0) + kv_head;
    const int64_t offset = (head * shape.block_size + at % shape.block_size) * shape.head_size;
    return pages.pages + page * pages.page_bytes + offset * element();
  }
};

// Tiles of 16 tokens to fetch while a block is computed. Pages lie anywhere, so the hardware does
// not see them coming; and a burst of prefetches would wait for memory like loads do, so lines are
// asked for one at a time between the arithmetic: a tile has as many 64-byte lines as its product
// has steps. Where nothing follows the tiles are the block's own.
struct Ahead {
  const uint8_t* keys[kKvBlock / 16];
  const uint8_t* values[kKvBlock / 16];
};

// Buffers of one thread.
struct AttentionScratch {
  std::vector<float> scores;         // [64][16]
  std::vector<uint8_t> weights;      // exponentials, as the product with values reads them
  std::vector<uint8_t> queries;      // [tiles][Dp][16] in the KV's type
  std::vector<uint8_t> key_copy;     // [64][Dp]
  std::vector<uint8_t> value_copy;   // [64][Dp]
  std::vector<uint8_t> arranged;     // values of bf16, in the order of the product with weights
  std::vector<float> states;         // [tiles] x LaneState
};

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

// Words of two tokens' features beside each other.
inline u32x16 interleave(const uint16_t* first, const uint16_t* second) {
  u16x16 a, b;
  std::memcpy(&a, first, sizeof a);
  std::memcpy(&b, second, sizeof b);
  return widen_words(a) | (widen_words(b) << 16);
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

// ---- one block -------------------------------------------------------------------------------

// Makes 64 tokens from `begin` readable. Only what the context does not reach, and what a tile
// cannot read in place, is copied; tokens behind the context become zeros, for pages may hold
// anything there.
inline KvBlock open_block(const Context& c, int begin, int kv_len, int kv_head,
                          AttentionScratch& scratch) {
  const AttentionShape& s = c.shape;
  const int padded = padded_head(s), bytes = c.element();
  KvBlock block;
  block.tokens = kv_len - begin < kKvBlock ? kv_len - begin : kKvBlock;
  const bool is_whole = s.block_size % 16 == 0 && block.tokens == kKvBlock;
  const bool in_place = is_whole && s.head_size == padded;
  block.key_stride = ptrdiff_t(in_place ? s.head_size : padded) * bytes;
  if (in_place) {
    for (int t = 0; t < kKvBlock / 16; ++t) {
      block.keys[t] = c.token(begin + 16 * t, kv_head, false);
      block.values[t] = c.token(begin + 16 * t, kv_head, true);
    }
  } else {
    for (auto [copy, is_value] : {std::pair{&scratch.key_copy, false}, {&scratch.value_copy, true}}) {
      std::memset(copy->data(), 0, size_t(kKvBlock) * padded * bytes);
      for (int t = 0; t < block.tokens; ++t) {
        std::memcpy(copy->data() + t * padded * bytes, c.token(begin + t, kv_head, is_value),
                    s.head_size * bytes);
      }
    }
    for (int t = 0; t < kKvBlock / 16; ++t) {
      block.keys[t] = scratch.key_copy.data() + 16 * t * block.key_stride;
      block.values[t] = scratch.value_copy.data() + 16 * t * block.key_stride;
    }
  }
  return block;
}

// Values in the order of the product with weights; float32 is read in place.
inline void arrange_values(const KvBlock& block, int padded, uint8_t* out) {
  const auto pair = [&](int p, int d) {
    const uint8_t* tile = block.values[p / 8] + (2 * p % 16) * block.key_stride + 2 * d;
    return interleave(reinterpret_cast<const uint16_t*>(tile),
                      reinterpret_cast<const uint16_t*>(tile + block.key_stride));
  };
#if defined(__AMX_TILE__)
  for (int half = 0; half < 2; ++half) {
    for (int d = 0; d < padded; d += 16) {
      u32x16 rows[16];
      for (int p = 0; p < 16; ++p) rows[p] = pair(16 * half + p, d);
      transpose(rows);
      for (int i = 0; i < 16; ++i) store_as(out + (d + i) * 128 + 64 * half, rows[i]);
    }
  }
#else
  for (int p = 0; p < kKvBlock / 2; ++p) {
    for (int d = 0; d < padded; d += 16) {
      const u32x16 words = pair(p, d);
      std::memcpy(out + (size_t(p) * padded + d) * 4, &words, sizeof words);
    }
  }
#endif
}

// Updates a lane tile's state with the first `used` tokens of a block. Lanes beyond those in use compute harmless numbers.
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
  const f32x16 before = load(state.largest), now = max(before, top);
  // Differences first: equal scores then give exactly 1, fused multiply-add or not.
  const f32x16 base = now == kNever ? f32x16{} : now;
  const f32x16 shrink = exp2((before - base) * scale);
  f32x16 total = load(state.sum) * shrink;
  store(state.largest, now);
  const auto weight = [&](int t) {
    const f32x16 p = exp2((load(scores + t * kLanes) - base) * scale);
    total += p;
    return p;
  };
  uint8_t* weights = scratch.weights.data();
  if (s.kv_type == Type::kF32) {
    for (int t = 0; t < used; ++t) {
      store(reinterpret_cast<float*>(weights) + t * kLanes, weight(t));
    }
  } else {
    for (int t = 0; t < kKvBlock; t += 2) {
      const f32x16 p0 = t < used ? weight(t) : f32x16{};
      const f32x16 p1 = t + 1 < used ? weight(t + 1) : f32x16{};
      fetch_row(ahead.values, t);
      fetch_row(ahead.values, t + 1);
      const u32x16 words = widen_words(to_bf16(p0)) | (widen_words(to_bf16(p1)) << 16);
      std::memcpy(weights + t * 32, &words, sizeof words);
    }
  }
  store(state.sum, total);
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
    values_bf16(values, kKvBlock / 2, weights, padded, state.values, ahead);
#endif
  }
}

// ---- one item --------------------------------------------------------------------------------

// Lanes of a tile and what they see of their row's context.
struct LaneTile {
  int kv_head;
  int lane;            // the first one
  int count;
  i32x16 position;     // of each lane's query
  int32_t lowest, highest;
};

inline LaneTile lane_tile(const Batch& batch, int row, int kv_head, int lane, int count) {
  const int q_len = batch.cu_q[row + 1] - batch.cu_q[row];
  const int before = batch.kv_lens[row] - q_len;
  LaneTile tile{kv_head, lane, count, {}, INT32_MAX, 0};
  for (int i = 0; i < kLanes; ++i) {
    const int query = (lane + (i < count ? i : 0)) % q_len;
    int position = before + query;
    if (batch.tree_mask) {
      const uint8_t* mask = batch.tree_mask + batch.mask_offsets[row] + int64_t(query) * q_len;
      position = before - 1;
      for (int j = 0; j < q_len; ++j) position += mask[j] != 0;
    }
    tile.position[i] = position;
    tile.lowest = position < tile.lowest ? position : tile.lowest;
    tile.highest = position > tile.highest ? position : tile.highest;
  }
  return tile;
}

inline int tiles_of(const Batch& batch, const AttentionItem& item, LaneTile* tiles) {
  int count = 0;
  for (int g = item.kv_head; g < item.kv_head + item.kv_heads; ++g) {
    for (int lane = 0; lane < item.lanes; lane += kLanes) {
      const int used = item.lanes - lane < kLanes ? item.lanes - lane : kLanes;
      tiles[count++] = lane_tile(batch, item.row, g, item.lane + lane, used);
    }
  }
  return count;
}

// Where a lane's head begins in a row of queries or of results.
inline int64_t lane_offset(const Context& c, const LaneTile& tile, int i, ptrdiff_t stride) {
  const AttentionShape& s = c.shape;
  const int first = c.batch.cu_q[c.row], q_len = c.batch.cu_q[c.row + 1] - first;
  const int lane = tile.lane + i, head = tile.kv_head * (s.heads / s.kv_heads) + lane / q_len;
  return (first + lane % q_len) * stride + int64_t(head) * s.head_size;
}

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

// What tile `i`'s block is followed by: the next head's block, or the one further on.
inline Ahead look_ahead(const Context& c, const LaneTile* tiles, int i, int num_tiles, int at,
                        int end, const KvBlock& block) {
  const bool is_last_head = tiles[i].kv_head == tiles[num_tiles - 1].kv_head;
  const int head = is_last_head ? tiles[0].kv_head : tiles[i].kv_head + 1;
  const int begin = is_last_head ? at + kKvBlock : at;
  Ahead ahead;
  for (int t = 0; t < kKvBlock / 16; ++t) {
    const bool is_there = c.shape.block_size % 16 == 0 && begin + 16 * t < end;
    ahead.keys[t] = is_there ? c.token(begin + 16 * t, head, false) : block.keys[t];
    ahead.values[t] = is_there ? c.token(begin + 16 * t, head, true) : block.values[t];
  }
  return ahead;
}

// Attends the tiles of an item to [begin, end) of the context and merges the result into `totals`.
inline void attend_split(const Context& c, const LaneTile* tiles, int num_tiles, int begin, int end,
                         AttentionScratch& scratch, float* totals) {
  const AttentionShape& s = c.shape;
  const Batch& batch = c.batch;
  const int padded = padded_head(s), kv_len = batch.kv_lens[c.row];
  const int q_len = batch.cu_q[c.row + 1] - batch.cu_q[c.row], before = kv_len - q_len;
  const size_t state_size = state_floats(padded);
  const size_t query_bytes = size_t(padded) * kLanes * c.element();
  const int window = s.window > 0 ? s.window : INT32_MAX / 2;
  for (int i = 0; i < num_tiles; ++i) {
    clear(state_at(scratch.states.data() + i * state_size), padded);
  }
  for (int at = begin; at < end; at += kKvBlock) {
    const int last = (at + kKvBlock < kv_len ? at + kKvBlock : kv_len) - 1;
    int open = -1;
    KvBlock block;
    Ahead ahead;
    for (int i = 0; i < num_tiles; ++i) {
      const LaneTile& tile = tiles[i];
      // Tokens of this step may be anywhere in a tree; a position tells about those before it.
      const bool is_past = last <= tile.lowest - window;
      const bool is_ahead = batch.tree_mask ? false : at > tile.highest;
      if (is_past || is_ahead) continue;
      const bool is_first = open != tile.kv_head;
      if (is_first) {
        open = tile.kv_head;
        block = open_block(c, at, kv_len, open, scratch);
        ahead = look_ahead(c, tiles, i, num_tiles, at, end, block);
        if (s.kv_type != Type::kF32) arrange_values(block, padded, scratch.arranged.data());
      }
      const uint8_t* values = scratch.arranged.data();
      const uint8_t* q = scratch.queries.data() + i * query_bytes;
      const LaneState state = state_at(scratch.states.data() + i * state_size);
      const bool reaches_step = batch.tree_mask && last >= before;
      const bool is_masked = reaches_step || last > tile.lowest || at <= tile.highest - window;
      if (!reaches_step) {
        const i32x16 oldest = tile.position - window;
        // Behind the last query's own token nothing is seen, and leaving it out changes no sum.
        const int reach = tile.highest + 1 - at;
        const int used = reach < block.tokens ? reach : block.tokens;
        const auto seen = [&](int t) -> i32x16 {
          return (tile.position >= at + t) & (oldest < at + t);
        };
        if (is_first) {
          attend_block<true>(c, block, used, ahead, q, values, is_masked, seen, scratch, state);
        } else {
          attend_block<false>(c, block, used, ahead, q, values, is_masked, seen, scratch, state);
        }
      } else {
        const uint8_t* mask = batch.tree_mask + batch.mask_offsets[c.row];
        attend_block<false>(c, block, block.tokens, ahead, q, values, true, [&](int t) -> i32x16 {
          i32x16 seen = {};
          const int node = at + t - before;
          int depth = 0;
          for (int j = 0; node >= 0 && j < q_len; ++j) depth += mask[int64_t(node) * q_len + j] != 0;
          const int position = node < 0 ? at + t : before + depth - 1;
          for (int l = 0; l < tile.count; ++l) {
            const int query = (tile.lane + l) % q_len;
            const bool is_seen = node < 0 || mask[int64_t(query) * q_len + node] != 0;
            seen[l] = is_seen && position > tile.position[l] - window ? -1 : 0;
          }
          return seen;
        }, scratch, state);
      }
    }
  }
  for (int i = 0; i < num_tiles; ++i) {
    merge(state_at(totals + i * state_size), state_at(scratch.states.data() + i * state_size),
          s.scale * kLog2E, padded);
  }
}

inline void reserve(AttentionScratch& scratch, const AttentionShape& s) {
  const size_t padded = padded_head(s), bytes = bytes_of(s.kv_type);
  scratch.scores.resize(kKvBlock * kLanes);
  scratch.weights.resize(kKvBlock * kLanes * bytes);
  scratch.queries.resize(kTilesPerItem * padded * kLanes * bytes);
  scratch.states.resize(2 * kTilesPerItem * state_floats(padded));
  scratch.key_copy.resize(kKvBlock * padded * bytes);
  scratch.value_copy.resize(kKvBlock * padded * bytes);
  scratch.arranged.resize(kKvBlock * padded * bytes);
}

// Computes one item. With `partials`, the state of its split is left there; else the finished
// lanes are written to `out`.
inline void attend(const AttentionShape& s, const Pages& pages, const Batch& batch,
                   const AttentionItem& item, const float* q, ptrdiff_t q_stride, float* out,
                   ptrdiff_t out_stride, float* partials, AttentionScratch& scratch) {
  const Context c{s, pages, batch, item.row};
  const int padded = padded_head(s), kv_len = batch.kv_lens[item.row];
  const size_t state_size = state_floats(padded);
  reserve(scratch, s);
#if defined(__AMX_TILE__)
  if (s.kv_type != Type::kF32) configure_attention_tiles();
#endif
  LaneTile tiles[kTilesPerItem];
  const int num_tiles = tiles_of(batch, item, tiles);
  for (int i = 0; i < num_tiles; ++i) {
    pack_queries(c, tiles[i], q, q_stride,
                 scratch.queries.data() + size_t(i) * padded * kLanes * c.element());
  }
  float* totals = partials ? partials : scratch.states.data() + kTilesPerItem * state_size;
  int needed = 0;
  for (int i = 0; i < num_tiles; ++i) {
    clear(state_at(totals + i * state_size), padded);
    needed = tiles[i].highest + 1 > needed ? tiles[i].highest + 1 : needed;
  }
  if (batch.tree_mask || needed > kv_len) needed = kv_len;
  const int begin = partials ? item.split * kKvSplit : 0;
  const int end = partials && begin + kKvSplit < needed ? begin + kKvSplit : needed;
  for (int at = begin; at < end; at += kKvSplit) {
    attend_split(c, tiles, num_tiles, at, at + kKvSplit < end ? at + kKvSplit : end, scratch,
                 totals);
  }
  if (partials) return;
  for (int i = 0; i < num_tiles; ++i) {
    write_lanes(c, tiles[i], state_at(totals + i * state_size), out, out_stride);
  }
}

// Merges the splits of an item, in order, and writes its lanes.
inline void join_splits(const AttentionShape& s, const Pages& pages, const Batch& batch,
                        const AttentionItem& item, float* partials, float* out,
                        ptrdiff_t out_stride, AttentionScratch& scratch) {
  const Context c{s, pages, batch, item.row};
  const int padded = padded_head(s);
  reserve(scratch, s);
  LaneTile tiles[kTilesPerItem];
  const int num_tiles = tiles_of(batch, item, tiles);
  const LaneState total = state_at(scratch.states.data());
  for (int t = 0; t < num_tiles; ++t) {
    clear(total, padded);
    for (int i = 0; i < item.num_splits; ++i) {
      float* part = partials + size_t(i * num_tiles + t) * state_floats(padded);
      merge(total, state_at(part), s.scale * kLog2E, padded);
    }
    write_lanes(c, tiles[t], total, out, out_stride);
  }
}

}  // namespace PACELINE_ISA
}  // namespace paceline
