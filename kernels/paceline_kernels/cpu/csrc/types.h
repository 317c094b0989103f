// Values shared by all instruction sets: packed weights, left operands, attention work.
//
// Shape legend: N tokens, K input features, O output features, R rows (sequences), H query
// heads, G key/value heads, D head size, T tokens per page.
#pragma once

#include <cstddef>
#include <cstdint>

namespace paceline {

enum class Type : int { kF32 = 0, kBF16 = 1, kI8 = 2, kF16 = 3 };

constexpr int kPanel = 32;    // output features of a panel
constexpr int kRowBlock = 32; // tokens of one tile product
constexpr int kKvBlock = 64;  // context tokens that share one rescaling of the softmax
constexpr int kKvSplit = 256; // context tokens that are summed up by themselves

constexpr int round_up(int x, int to) { return (x + to - 1) / to * to; }

// Input features are padded with zeros to whole 64-byte rows of a tile.
constexpr int padded_inputs(Type type, int inputs) {
  return round_up(inputs, type == Type::kI8 ? 64 : type == Type::kBF16 ? 32 : 1);
}

constexpr int bytes_of(Type type) { return type == Type::kF32 ? 4 : type == Type::kI8 ? 1 : 2; }

// A weight [O, K] in panels of 32 outputs, in the order in which a product reads it:
//   f32   [panel][K][32]
//   bf16  [panel][K/2W][2 halves][W pairs of K][16 outputs][2]
//   int8  [panel][K/4W][2 halves][W quads of K][16 outputs][4], w = q * scale[output]
// With AMX, W is 16 and a half is the right operand of one tile product (Intel SDM, TDPBF16PS).
// Elsewhere W is 1 and memory is read from end to end, as hardware prefetchers expect.
struct PackedWeight {
  Type type = Type::kF32;
  int outputs = 0;
  int inputs = 0;
  int padded = 0;               // inputs with padding
  int panels = 0;
  int words = 1;                // W
  uint8_t* data = nullptr;
  float* scales = nullptr;      // [panels * 32], int8 only
  int32_t* sums = nullptr;      // [panels * 32] 128 * sum of q: what products with kI8Offset are off by
  float* bias = nullptr;        // [panels * 32] or null

  size_t panel_bytes() const { return size_t(padded) * kPanel * bytes_of(type); }

  // Where the `word`th pair or quad of inputs of an output is in its panel.
  size_t word_offset(int word, int column) const {
    return (size_t(word / words) * 2 + column / 16) * words * 64 + word % words * 64 + column % 16 * 4;
  }
};

// Bytes from row to row of a product's left operand. The odd number of cache lines keeps the rows of
// a tile in different sets of the cache.
constexpr ptrdiff_t operand_stride(const PackedWeight& w) {
  const ptrdiff_t lines = (ptrdiff_t(w.padded) * bytes_of(w.type) + 63) / 64;
  return (lines | 1) * 64;
}

// The tokens' side of a product: rows of the weight's type, padded like it.
struct Operand {
  uint8_t* data = nullptr;
  ptrdiff_t stride = 0;         // bytes from row to row
  float* scales = nullptr;      // [N], int8 only
};

struct AttentionShape {
  int heads;
  int kv_heads;
  int head_size;
  int block_size;
  float scale;
  int window;                   // 0: everything
  Type kv_type;
};

// The pages of one layer: K of head g in page p is at pages + p * page_bytes + g * T * D
// elements, V behind all heads of K.
struct Pages {
  uint8_t* pages;
  ptrdiff_t page_bytes;
};

// Row r has queries [cu_q[r], cu_q[r+1]) and a context of kv_lens[r] tokens, its own included. Its
// last cu_tree[r+1] - cu_tree[r] tokens, its tail, form a tree: `tree_parents` are indices in the
// tail, each below its child's, or -1 for what hangs under the token in front of the tail.
struct Batch {
  int rows;
  const int32_t* cu_q;          // [R+1]
  const int32_t* kv_lens;       // [R]
  const int32_t* tables;        // [R, table_width]
  int table_width;
  const int32_t* cu_tree;       // [R+1], or null: no row has a tree
  const int32_t* tree_parents;
};

constexpr int kTilesPerItem = 8;

struct Tree;

// Some lanes of one row over a part of its context, for one key/value head or several that lie
// beside each other. A lane is one query of one query head of its key/value head's group,
// head-major: lane = head_in_group * q_len + query; in a tree lane = rank * heads_in_group +
// head_in_group. At most kTilesPerItem times 16 lanes.
struct AttentionItem {
  int row;
  const Tree* tree;             // of the row, or null
  int kv_head;
  int kv_heads;                 // more than 1 only where all lanes of a head fit into 16
  int lane;
  int lanes;
  int split;                    // -1: the whole context
  int num_splits;
  int partial;                  // where the partial results of split 0 are, if split

  int tiles() const { return kv_heads * ((lanes + 15) / 16); }
};

// What is known of a lane after some context (Milakov and Gimelshein 2018): the largest score,
// the sum of exponentials and the weighted sum of values, transposed: [D][16].
struct LaneState {
  float* largest;               // [16]
  float* sum;                   // [16]
  float* values;                // [Dp][16]
};

}  // namespace paceline
