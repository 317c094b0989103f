// Attention over paged KV in one pass (Dao et al. 2022, alg. 1).
//
// Context is taken in blocks of 64 and summed up in splits of 256, both counted from its start. Few
// lanes and many are computed by different code that does the same arithmetic in the same order; so
// a query's result depends neither on its neighbours, nor on whether it was computed in a prompt
// or by itself.
#pragma once

#include "attention_few.h"
#include "attention_wide.h"

namespace paceline {
namespace PACELINE_ISA {

// Adds what is known of more context to what is known of the context before it.
inline void merge(LaneState into, LaneState more, float exponent_scale, int padded, int few) {
  const f32x16 m0 = load(into.largest), m1 = load(more.largest), m = max(m0, m1);
  // Before anything was seen both are -inf, and their difference would be NaN.
  const f32x16 base = m == kNever ? f32x16{} : m;
  const f32x16 a = exp2((m0 - base) * exponent_scale), b = exp2((m1 - base) * exponent_scale);
  store(into.largest, m);
  store(into.sum, load(into.sum) * a + load(more.sum) * b);
  const auto add = [&](int at, f32x16 old_factor, f32x16 new_factor) {
    float* v = into.values + at;
    store(v, load(v) * old_factor + load(more.values + at) * new_factor);
  };
  if (few == 0) {
    for (int d = 0; d < padded; ++d) add(d * kLanes, a, b);
  }
  for (int l = 0; l < few; ++l) {
    for (int d = 0; d < padded; d += kLanes) add(l * padded + d, splat(a[l]), splat(b[l]));
  }
}

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

// How many lanes a tile of the item has, if that is few; 0 if it is computed as many.
inline int count_few(const AttentionShape& s, const Batch& batch, const AttentionItem& item) {
  return !batch.tree_mask && item.lanes <= few_lanes(s.kv_type) ? item.lanes : 0;
}

// What tile `i`'s block is followed by: the next head's block, or the one further on.
inline Ahead look_ahead(const Context& c, const LaneTile* tiles, int i, int num_tiles, int at,
                        const KvBlock& block) {
  const bool is_last_head = tiles[i].kv_head == tiles[num_tiles - 1].kv_head;
  const int head = is_last_head ? tiles[0].kv_head : tiles[i].kv_head + 1;
  const int begin = is_last_head ? at + kKvBlock : at, end = c.batch.kv_lens[c.row];
  Ahead ahead;
  for (int t = 0; t < kKvBlock / 16; ++t) {
    const bool is_there = c.shape.block_size % 16 == 0 && begin + 16 * t < end;
    ahead.keys[t] = is_there ? c.token(begin + 16 * t, head, false) : block.keys[t];
    ahead.values[t] = is_there ? c.token(begin + 16 * t, head, true) : block.values[t];
  }
  return ahead;
}

// Which lanes see the context's token at `at`, where the step's own tokens form a tree.
inline i32x16 seen_in_tree(const Context& c, const LaneTile& tile, int at, int window) {
  const int q_len = c.batch.cu_q[c.row + 1] - c.batch.cu_q[c.row];
  const int before = c.batch.kv_lens[c.row] - q_len, node = at - before;
  const uint8_t* mask = c.batch.tree_mask + c.batch.mask_offsets[c.row];
  int depth = 0;
  for (int j = 0; node >= 0 && j < q_len; ++j) depth += mask[int64_t(node) * q_len + j] != 0;
  const int position = node < 0 ? at : before + depth - 1;
  i32x16 seen = {};
  for (int l = 0; l < tile.count; ++l) {
    const int query = (tile.lane + l) % q_len;
    const bool is_seen = node < 0 || mask[int64_t(query) * q_len + node] != 0;
    seen[l] = is_seen && position > tile.position[l] - window ? -1 : 0;
  }
  return seen;
}

// Attends the tiles of an item to [begin, end) of the context and merges the result into `totals`.
inline void attend_split(const Context& c, const LaneTile* tiles, int num_tiles, int few, int begin,
                         int end, AttentionScratch& scratch, float* totals) {
  const AttentionShape& s = c.shape;
  const Batch& batch = c.batch;
  const int padded = padded_head(s), kv_len = batch.kv_lens[c.row];
  const int before = kv_len - (batch.cu_q[c.row + 1] - batch.cu_q[c.row]);
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
        ahead = look_ahead(c, tiles, i, num_tiles, at, block);
        if (s.kv_type != Type::kF32 && few == 0) {
          arrange_values(block, padded, scratch.arranged.data());
        }
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
        if (few > 0) {
          const auto attend = s.kv_type == Type::kF32 ? attend_few_lanes<Type::kF32>
                                                      : attend_few_lanes<Type::kBF16>;
          attend(c, tile, block, at, used, window, is_masked, ahead, q, scratch, state);
        } else if (is_first) {
          attend_block<true>(c, block, used, ahead, q, values, is_masked, seen, scratch, state);
        } else {
          attend_block<false>(c, block, used, ahead, q, values, is_masked, seen, scratch, state);
        }
      } else {
        const auto seen = [&](int t) { return seen_in_tree(c, tile, at + t, window); };
        attend_block<false>(c, block, block.tokens, ahead, q, values, true, seen, scratch, state);
      }
    }
  }
  for (int i = 0; i < num_tiles; ++i) {
    merge(state_at(totals + i * state_size), state_at(scratch.states.data() + i * state_size),
          s.scale * kLog2E, padded, few);
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
  if (s.kv_type != Type::kF32) configure_tiles(16);
#endif
  LaneTile tiles[kTilesPerItem];
  const int num_tiles = tiles_of(batch, item, tiles);
  const int few = count_few(s, batch, item);
  for (int i = 0; i < num_tiles; ++i) {
    uint8_t* packed = scratch.queries.data() + size_t(i) * padded * kLanes * c.element();
    few > 0 ? pack_few(c, tiles[i], q, q_stride, packed)
            : pack_queries(c, tiles[i], q, q_stride, packed);
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
    attend_split(c, tiles, num_tiles, few, at, at + kKvSplit < end ? at + kKvSplit : end, scratch,
                 totals);
  }
  if (partials) return;
  for (int i = 0; i < num_tiles; ++i) {
    const LaneState state = state_at(totals + i * state_size);
    few > 0 ? write_few(c, tiles[i], state, out, out_stride)
            : write_lanes(c, tiles[i], state, out, out_stride);
  }
}

// Merges the splits of an item, in order, and writes its lanes.
inline void join_splits(const AttentionShape& s, const Pages& pages, const Batch& batch,
                        const AttentionItem& item, float* partials, float* out,
                        ptrdiff_t out_stride, AttentionScratch& scratch) {
  const Context c{s, pages, batch, item.row};
  const int padded = padded_head(s), few = count_few(s, batch, item);
  reserve(scratch, s);
  LaneTile tiles[kTilesPerItem];
  const int num_tiles = tiles_of(batch, item, tiles);
  const LaneState total = state_at(scratch.states.data());
  for (int t = 0; t < num_tiles; ++t) {
    clear(total, padded);
    for (int i = 0; i < item.num_splits; ++i) {
      float* part = partials + size_t(i * num_tiles + t) * state_floats(padded);
      merge(total, state_at(part), s.scale * kLog2E, padded, few);
    }
    few > 0 ? write_few(c, tiles[t], total, out, out_stride)
            : write_lanes(c, tiles[t], total, out, out_stride);
  }
}

}  // namespace PACELINE_ISA
}  // namespace paceline
