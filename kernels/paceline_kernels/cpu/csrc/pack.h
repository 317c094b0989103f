// Brings weights into the order in which products read them (types.h, PackedWeight).
#pragma once

#include "memory.h"
#include "table.h"
#include "types.h"

namespace paceline {

// Rows of a checkpoint's tensor, row-major.
struct Source {
  const uint8_t* data;
  Type type;  // f32, bf16 or f16
  int rows;
};

// A weight and its memory.
struct OwnedWeight {
  HugeBuffer memory;
  PackedWeight weight;
};

// Packs sources one below the other, for the products of `table`. With `is_gated` there are two of equal height, and panels
// alternate 16 rows of the first with the 16 rows of the second that they gate. `biases`, float32
// of all rows or null, are permuted alike.
OwnedWeight pack_weight(const Table& table, Type type, const Source* sources, int count, int inputs,
                        bool is_gated, const float* biases);

}  // namespace paceline
