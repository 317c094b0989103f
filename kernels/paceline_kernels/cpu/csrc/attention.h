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

inline LaneTile lane_tile(const Context& c, int kv_head, int lane, int count) {
  LaneTile tile{kv_head, lane, count, {}, INT32_MAX, 0};
  for (int i = 0; i < kLanes; ++i) {
    const int position = c.position(lane + (i < count ? i : 0));
    tile.position[i] = position;
    tile.lowest = position < tile.lowest ? position : tile.lowest;
    tile.highest = position > tile.highest ? position : tile.highest;
  }
  return tile;
}

inline int tiles_of(const Context& c, const AttentionItem& item, LaneTile* tiles) {
  int count = 0;
  for (int g = item.kv_head; g < item.kv_head + item.kv_heads; ++g) {
    for (int lane = 0; lane < item.lanes; lane += kLanes) {
      const int used = item.lanes - lane < kLanes ? item.lanes - lane : kLanes;
      tiles[count++] = lane_tile(c, g, item.lane + lane, used);
    }
  }
  return count;
}

// How many lanes a tile of the item has, if that is few; 0 if it is computed as many.
inline int count_few(const AttentionShape& s, const AttentionItem& item) {
  return item.lanes <= few_lanes(s.kv_type) ? item.lanes : 0;
}

// An item as its blocks are computed.
struct Work {
  const Context& c;
  const LaneTile* tiles;
  int num_tiles;
  int few;
  int window;  // never 0
  AttentionScratch& scratch;

  int padded() const { return padded_head(c.shape); }
  LaneState state(int tile) const {
    return state_at(scratch.states.data() + tile * state_floats(padded()));
  }
  uint8_t* queries(int tile) const {
    return scratch.queries.data() + size_t(tile) * padded() * kLanes * c.element();
  }
  bool needs_arranged_values() const { return c.shape.kv_type != Type::kF32 && few == 0; }
};

inline Ahead nothing_ahead(const KvBlock& block) {
  Ahead ahead;
  std::memcpy(ahead.keys, block.keys, sizeof ahead.keys);
  std::memcpy(ahead.values, block.values, sizeof ahead.values);
  return ahead;
}

// What tile `i`'s block is followed by: the next head's block, or the one further on.
inline Ahead look_ahead(const Work& w, int i, int at, const KvBlock& block) {
  const Context& c = w.c;
  const bool is_last_head = w.tiles[i].kv_head == w.tiles[w.num_tiles - 1].kv_head;
  const int head = is_last_head ? w.tiles[0].kv_head : w.tiles[i].kv_head + 1;
  const int begin = is_last_head ? at + kKvBlock : at, end = c.kv_len();
  Ahead ahead = nothing_ahead(block);
  if (c.shape.block_size % 16 != 0) return ahead;
  for (int t = 0; t < kKvBlock / 16 && begin + 16 * t < end; ++t) {
    ahead.keys[t] = c.token(begin + 16 * t, head, false);
    ahead.values[t] = c.token(begin + 16 * t, head, true);
  }
  return ahead;
}

// Attends tile `i`, or what `tile` leaves of it, to the block at `at`.
inline void attend_tile(const Work& w, int i, const LaneTile& tile, const KvBlock& block, int at,
                        const Ahead& ahead, bool fetches) {
  const int last = at + block.tokens - 1, window = w.window;
  const bool is_masked = last > tile.lowest || at <= tile.highest - window;
  const i32x16 oldest = tile.position - window;
  // Behind the last query's own token nothing is seen, and leaving it out changes no sum.
  const int reach = tile.highest + 1 - at, used = reach < block.tokens ? reach : block.tokens;
  const auto seen = [&](int t) -> i32x16 {
    return (tile.position >= at + t) & (oldest < at + t);
  };
  const uint8_t *q = w.queries(i), *values = w.scratch.arranged.data();
  const LaneState state = w.state(i);
  if (w.few > 0) {
    const auto attend = w.c.shape.kv_type == Type::kF32 ? attend_few_lanes<Type::kF32>
                                                        : attend_few_lanes<Type::kBF16>;
    attend(w.c, tile, block, at, used, window, is_masked, ahead, q, w.scratch, state);
  } else if (fetches) {
    attend_block<true>(w.c, block, used, ahead, q, values, is_masked, seen, w.scratch, state);
  } else {
    attend_block<false>(w.c, block, used, ahead, q, values, is_masked, seen, w.scratch, state);
  }
}

// Attends all tiles to the block at `at`, every token of which is at its own position.
inline void attend_shared(const Work& w, int at) {
  const int kv_len = w.c.kv_len();
  const int last = (at + kKvBlock < kv_len ? at + kKvBlock : kv_len) - 1;
  int open = -1;
  KvBlock block;
  Ahead ahead;
  for (int i = 0; i < w.num_tiles; ++i) {
    const LaneTile& tile = w.tiles[i];
    const bool is_past = last <= tile.lowest - w.window, is_ahead = at > tile.highest;
    if (is_past || is_ahead) continue;
    const bool is_first = open != tile.kv_head;
    if (is_first) {
      open = tile.kv_head;
      block = open_block(w.c, at, kv_len, open, w.scratch);
      ahead = look_ahead(w, i, at, block);
      if (w.needs_arranged_values()) {
        arrange_values(block, w.padded(), 0, w.scratch.arranged.data());
      }
    }
    attend_tile(w, i, tile, block, at, ahead, is_first);
  }
}

// A tile whose lanes see nothing but those of the queries ranked [first, last). What a lane does
// not see leaves its state as it was, to the bit: the largest score stays, so earlier sums are
// multiplied by 1, and zeros are added.
inline LaneTile narrow(const Context& c, const LaneTile& tile, int first, int last) {
  LaneTile part{tile.kv_head, tile.lane, tile.count, {}, INT32_MAX, -1};
  for (int i = 0; i < kLanes; ++i) {
    const int rank = (tile.lane + (i < tile.count ? i : 0)) / c.group();
    const int position = first <= rank && rank < last ? tile.position[i] : -1;
    part.position[i] = position;
    part.lowest = position < part.lowest ? position : part.lowest;
    part.highest = position > part.highest ? position : part.highest;
  }
  return part;
}

// Attends tiles [begin, end), which are of one key/value head, to the block at `at`, into which
// the row's tail reaches: one path after the other, each with the queries that are its own.
inline void attend_paths(const Work& w, int begin, int end, int at) {
  const Context& c = w.c;
  const Tree& tree = *c.tree;
  const int kv_head = w.tiles[begin].kv_head, front = tree.begin > at ? tree.begin - at : 0;
  KvBlock block = open_front(c, at, front, kv_head, w.scratch);
  const Ahead ahead = nothing_ahead(block);
  int changed = 0;  // first token that `arranged` does not have yet
  for (const TreePath& path : tree.paths) {
    const int left = tree.begin + int(path.entries.size()) - at;
    block.tokens = left < kKvBlock ? left : kKvBlock;
    bool is_open = false;
    for (int i = begin; i < end; ++i) {
      const LaneTile tile = narrow(c, w.tiles[i], path.first_rank, path.last_rank);
      if (at > tile.highest) continue;
      if (!is_open) {
        is_open = true;
        for (int t = front; t < block.tokens; ++t) {
          const int entry = path.entries[at + t - tree.begin];
          copy_token(c, tree.begin + entry, kv_head, t, w.scratch);
        }
        if (w.needs_arranged_values()) {
          arrange_values(block, w.padded(), changed, w.scratch.arranged.data());
        }
        changed = front;
      }
      attend_tile(w, i, tile, block, at, ahead, false);
    }
  }
}

// Attends the tiles of an item to [begin, end) of the context and merges the result into `totals`.
inline void attend_split(const Work& w, int begin, int end, float* totals) {
  const AttentionShape& s = w.c.shape;
  for (int i = 0; i < w.num_tiles; ++i) clear(w.state(i), w.padded());
  for (int at = begin; at < end; at += kKvBlock) {
    if (!w.c.tree || at + kKvBlock <= w.c.tree->begin) {
      attend_shared(w, at);
      continue;
    }
    for (int i = 0, next; i < w.num_tiles; i = next) {
      for (next = i; next < w.num_tiles && w.tiles[next].kv_head == w.tiles[i].kv_head;) ++next;
      attend_paths(w, i, next, at);
    }
  }
  for (int i = 0; i < w.num_tiles; ++i) {
    merge(state_at(totals + i * state_floats(w.padded())), w.state(i), s.scale * kLog2E,
          w.padded(), w.few);
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
  const Context c{s, pages, batch, item.row, item.tree};
  const int padded = padded_head(s);
  const size_t state_size = state_floats(padded);
  reserve(scratch, s);
#if defined(__AMX_TILE__)
  if (s.kv_type != Type::kF32) configure_tiles(16);
#endif
  LaneTile tiles[kTilesPerItem];
  const int num_tiles = tiles_of(c, item, tiles), few = count_few(s, item);
  const Work work{c, tiles, num_tiles, few, s.window > 0 ? s.window : INT32_MAX / 2, scratch};
  float* totals = partials ? partials : scratch.states.data() + kTilesPerItem * state_size;
  int needed = 0;
  for (int i = 0; i < num_tiles; ++i) {
    few > 0 ? pack_few(c, tiles[i], q, q_stride, work.queries(i))
            : pack_queries(c, tiles[i], q, q_stride, work.queries(i));
    clear(state_at(totals + i * state_size), padded);
    needed = tiles[i].highest + 1 > needed ? tiles[i].highest + 1 : needed;
  }
  const int begin = partials ? item.split * kKvSplit : 0;
  const int end = partials && begin + kKvSplit < needed ? begin + kKvSplit : needed;
  for (int at = begin; at < end; at += kKvSplit) {
    attend_split(work, at, at + kKvSplit < end ? at + kKvSplit : end, totals);
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
  const Context c{s, pages, batch, item.row, item.tree};
  const int padded = padded_head(s), few = count_few(s, item);
  reserve(scratch, s);
  LaneTile tiles[kTilesPerItem];
  const int num_tiles = tiles_of(c, item, tiles);
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
