// What attention over few lanes and over many have in common: the context in its pages.
#pragma once

#include <utility>
#include <vector>

#include "rows.h"
#include "simd.h"
#include "tree.h"
#include "types.h"

namespace paceline {
namespace PACELINE_ISA {

constexpr float kNever = -INFINITY;

// One block of context, ready to be read: pointers to tiles of 16 keys and of 16 values.
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

struct Context {
  const AttentionShape& shape;
  const Pages& pages;
  const Batch& batch;
  int row;
  const Tree* tree;  // or null

  int q_len() const { return batch.cu_q[row + 1] - batch.cu_q[row]; }
  int kv_len() const { return batch.kv_lens[row]; }
  int group() const { return shape.heads / shape.kv_heads; }
  int query(int lane) const { return tree ? tree->queries[lane / group()] : lane % q_len(); }
  int head(int lane) const { return tree ? lane % group() : lane / q_len(); }
  int position(int lane) const {
    return tree ? tree->begin + tree->depths[lane / group()] : kv_len() - q_len() + lane % q_len();
  }
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
  std::vector<float> scores;         // [64][16], or [lanes][64] where they are few
  std::vector<uint8_t> weights;      // exponentials, as the product with values reads them
  std::vector<uint8_t> queries;      // [tiles][Dp][16] in the KV's type, or [tiles][lanes][Dp]
  std::vector<uint8_t> key_copy;     // [64][Dp]
  std::vector<uint8_t> value_copy;   // [64][Dp]
  std::vector<uint8_t> arranged;     // values of bf16, in the order of the product with weights
  std::vector<float> states;         // [tiles] x LaneState
};

// Lanes of a tile and what they see of their row's context.
struct LaneTile {
  int kv_head;
  int lane;            // the first one
  int count;
  i32x16 position;     // of each lane's query
  int32_t lowest, highest;
};

// Where a lane's head begins in a row of queries or of results.
inline int64_t lane_offset(const Context& c, const LaneTile& tile, int i, ptrdiff_t stride) {
  const int lane = tile.lane + i, head = tile.kv_head * c.group() + c.head(lane);
  return (c.batch.cu_q[c.row] + c.query(lane)) * stride + int64_t(head) * c.shape.head_size;
}

// A block of zeros in the thread's own copies.
inline KvBlock empty_copy(const Context& c, AttentionScratch& scratch) {
  KvBlock block;
  block.key_stride = ptrdiff_t(padded_head(c.shape)) * c.element();
  block.tokens = 0;
  std::memset(scratch.key_copy.data(), 0, kKvBlock * block.key_stride);
  std::memset(scratch.value_copy.data(), 0, kKvBlock * block.key_stride);
  for (int t = 0; t < kKvBlock / 16; ++t) {
    block.keys[t] = scratch.key_copy.data() + 16 * t * block.key_stride;
    block.values[t] = scratch.value_copy.data() + 16 * t * block.key_stride;
  }
  return block;
}

// Puts the context's token at `from` to the copy's place `to`.
inline void copy_token(const Context& c, int from, int kv_head, int to, AttentionScratch& scratch) {
  const size_t bytes = size_t(c.shape.head_size) * c.element();
  const size_t at = size_t(to) * padded_head(c.shape) * c.element();
  std::memcpy(scratch.key_copy.data() + at, c.token(from, kv_head, false), bytes);
  std::memcpy(scratch.value_copy.data() + at, c.token(from, kv_head, true), bytes);
}

// Whether tiles of 16 tokens lie in their pages as products read them.
inline bool is_read_in_place(const AttentionShape& s) {
  return s.block_size % 16 == 0 && s.head_size == padded_head(s);
}

// Makes the first `count` tokens from `begin` readable, those of the last tile as copies; the rest
// of the block is zeros, to be filled.
inline KvBlock open_front(const Context& c, int begin, int count, int kv_head,
                          AttentionScratch& scratch) {
  KvBlock block = empty_copy(c, scratch);
  block.tokens = count;
  int copied = 0;
  for (; is_read_in_place(c.shape) && copied + 16 <= count; copied += 16) {
    block.keys[copied / 16] = c.token(begin + copied, kv_head, false);
    block.values[copied / 16] = c.token(begin + copied, kv_head, true);
  }
  for (int t = copied; t < count; ++t) copy_token(c, begin + t, kv_head, t, scratch);
  return block;
}

// Makes 64 tokens from `begin` readable. Only what the context does not reach, and what a tile
// cannot read in place, is copied; tokens behind the context become zeros, for pages may hold
// anything there.
inline KvBlock open_block(const Context& c, int begin, int kv_len, int kv_head,
                          AttentionScratch& scratch) {
  if (kv_len - begin < kKvBlock) return open_front(c, begin, kv_len - begin, kv_head, scratch);
  if (!is_read_in_place(c.shape)) return open_front(c, begin, kKvBlock, kv_head, scratch);
  KvBlock block;
  block.key_stride = ptrdiff_t(c.shape.head_size) * c.element();
  block.tokens = kKvBlock;
  for (int t = 0; t < kKvBlock / 16; ++t) {
    block.keys[t] = c.token(begin + 16 * t, kv_head, false);
    block.values[t] = c.token(begin + 16 * t, kv_head, true);
  }
  return block;
}

// Words of two tokens beside each other.
inline u32x16 interleave(u16x16 first, u16x16 second) {
  return widen_words(first) | (widen_words(second) << 16);
}

// How what is known of lanes changes with the largest score of a block.
struct Rescale {
  f32x16 base;    // what exponents are taken against
  f32x16 shrink;  // factor of earlier sums
};

inline Rescale rescale(LaneState state, f32x16 top, float exponent_scale) {
  const f32x16 before = load(state.largest), now = max(before, top);
  store(state.largest, now);
  // Differences first: equal scores then give exactly 1, fused multiply-add or not. Before anything
  // was seen both are -inf, and their difference would be NaN.
  const f32x16 base = now == kNever ? f32x16{} : now;
  return {base, exp2((before - base) * exponent_scale)};
}

// A block's exponentials are summed in four runs, every fourth token in each.
inline f32x16 add_up(LaneState state, f32x16 shrink, const f32x16 runs[4]) {
  return load(state.sum) * shrink + ((runs[0] + runs[2]) + (runs[1] + runs[3]));
}

}  // namespace PACELINE_ISA
}  // namespace paceline
