// The operations that exist once per instruction set, as a table of functions.
#pragma once

#include <memory>

#include "draw.h"
#include "team.h"
#include "types.h"

namespace paceline {

enum class Epilogue { kStore, kAdd, kGate };

// out (=, +=) operand x weight. With kGate, each panel holds 16 gates and their 16 factors, and
// out gets silu(gate) * factor, half as many features.
struct Product {
  const PackedWeight* weight;
  Operand operand;
  int rows;
  Epilogue epilogue;
  float* out;
  ptrdiff_t out_stride;  // floats
};

struct ThreadScratch;  // buffers of one thread, per instruction set

struct Table {
  const char* name;
  int words;  // of packed weights
  ThreadScratch* (*new_scratch)();
  void (*free_scratch)(ThreadScratch*);
  // Around the calls of one thread in one step: tile registers are taken and given back.
  void (*enter)();
  void (*leave)();
  // The team's threads share the panels; finished at the next barrier.
  void (*product)(Team&, int thread, const Product&, ThreadScratch&);
  void (*prepare_row)(Type, const float* x, const float* norm_weight, float eps, int size,
                      int padded, uint8_t* out, float* scale);
  void (*rms_norm)(const float* x, const float* weight, float eps, int size, float* out);
  void (*rotate)(float* x, const float* table, int head_size);
  void (*store_kv)(const float* x, int size, Type, uint8_t* out);
  void (*widen)(const uint8_t* row, Type, int size, float* out);
  size_t (*partial_floats)(const AttentionShape&);
  void (*attend)(const AttentionShape&, const Pages&, const Batch&, const AttentionItem&,
                 const float* q, ptrdiff_t q_stride, float* out, ptrdiff_t out_stride,
                 float* partials, ThreadScratch&);
  void (*join_splits)(const AttentionShape&, const Pages&, const Batch&, const AttentionItem&,
                      float* partials, float* out, ptrdiff_t out_stride, ThreadScratch&);
  void (*draw_row)(const DrawCall&, int64_t row);
  void (*candidates_row)(const CandidatesCall&, int64_t row);
  void (*likeliest_row)(const LikeliestCall&, int64_t place);
};

// The best table this machine runs, or the named one ("portable", "avx2", "avx512", "amx");
// null if the machine cannot run it. AMX needs the kernel's permission, which is asked for here.
const Table* find_table(const char* name);

}  // namespace paceline
