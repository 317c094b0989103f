// The C interface that Python calls by ctypes. Pointers are raw; their sizes are checked there.
#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "decoder.h"

using namespace paceline;

namespace {

const Table* chosen = nullptr;
// What the calling thread makes uses this team; decoders keep the one they were made with. A
// thread that loads a model beside a running one neither sees nor changes what that one uses.
thread_local std::shared_ptr<Team> team;
// Those of all sizes that are still in use, so that none is made twice: two would spin beside
// each other.
std::map<int, std::weak_ptr<Team>> teams;
std::mutex teams_mutex;

const Table& table() { return chosen ? *chosen : *(chosen = find_table(nullptr)); }

// Fewer logits than these are looked through by the caller alone.
constexpr int64_t kSharedLogits = 1 << 18;

std::shared_ptr<Team> team_of(int threads) {
  const std::lock_guard lock(teams_mutex);
  auto found = teams[threads].lock();
  if (!found) teams[threads] = found = std::make_shared<Team>(threads);
  return found;
}

std::shared_ptr<Team> current_team() {
  if (!team) team = team_of(1);
  return team;
}

struct Linear {
  const Table& table;
  OwnedWeight owned;
};

std::vector<float> floats(const float* p, int n) {
  return p ? std::vector<float>(p, p + n) : std::vector<float>();
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// Changes whenever a signature or a structure here does.
int pl_interface() { return 5; }

const char* pl_isa() { return table().name; }

// 0 if the machine runs it. Decoders made before keep theirs.
int pl_use_isa(const char* name) {
  const Table* found = find_table(name);
  if (found) chosen = found;
  return found ? 0 : -1;
}

int pl_threads() { return current_team()->size(); }

void pl_set_threads(int threads) {
  if (threads != current_team()->size()) team = team_of(threads);
}

// ---- operations ------------------------------------------------------------------------------

void pl_rms_norm(const float* x, const float* weight, float eps, int rows, int size, float* out) {
  for (int r = 0; r < rows; ++r) {
    table().rms_norm(x + int64_t(r) * size, weight, eps, size, out + int64_t(r) * size);
  }
}

void pl_rotate(float* x, const int64_t* positions, const float* cos_sin, int rows, int heads,
               int size) {
  for (int r = 0; r < rows; ++r) {
    for (int h = 0; h < heads; ++h) {
      table().rotate(x + (int64_t(r) * heads + h) * size, cos_sin + positions[r] * 2 * size, size);
    }
  }
}

void* pl_linear_new(int type, const void* weight, int source_type, int outputs, int inputs,
                    const float* bias, int is_gated) {
  const Source whole{static_cast<const uint8_t*>(weight), Type(source_type), outputs};
  return new Linear{
      table(), pack_weight(table(), Type(type), &whole, 1, inputs, is_gated != 0, bias)};
}

void pl_linear_free(void* linear) { delete static_cast<Linear*>(linear); }

// x [rows, inputs] float32 -> out [rows, outputs], or half as many when gated.
void pl_linear(void* linear, const float* x, int rows, int is_gated, float* out) {
  const auto& [ops, owned] = *static_cast<Linear*>(linear);
  const PackedWeight& w = owned.weight;
  const auto held = current_team();
  Team& threads = *held;
  const ptrdiff_t stride = operand_stride(w);
  HugeBuffer operand(size_t(round_up(rows, kRowBlock)) * stride);
  std::vector<float> scales(rows);
  const Product product{&w, {operand.data(), stride, scales.data()}, rows,
                        is_gated ? Epilogue::kGate : Epilogue::kStore, out,
                        is_gated ? w.outputs / 2 : w.outputs};
  threads.run([&](int thread) {
    ThreadScratch* scratch = ops.new_scratch();
    ops.enter();
    for (int r; (r = threads.next_task()) < rows;) {
      ops.prepare_row(w.type, x + int64_t(r) * w.inputs, nullptr, 0, w.inputs, w.padded,
                          operand.data() + r * stride, &scales[r]);
    }
    threads.barrier();
    ops.product(threads, thread, product, *scratch);
    ops.leave();
    ops.free_scratch(scratch);
  });
}

// One layer's attention as an operation by itself; `split` forces the way of few items.
void pl_attention(const AttentionShape* shape, uint8_t* kv, ptrdiff_t page_bytes,
                  const Batch* batch, const float* q, float* out, int split) {
  const Pages pages{kv, page_bytes};
  const ptrdiff_t stride = ptrdiff_t(shape->heads) * shape->head_size;
  const size_t partial = table().partial_floats(*shape);
  ThreadScratch* scratch = table().new_scratch();
  table().enter();
  for (int r = 0; r < batch->rows; ++r) {
    const int all = (batch->cu_q[r + 1] - batch->cu_q[r]) * (shape->heads / shape->kv_heads);
    const int splits = (batch->kv_lens[r] + kKvSplit - 1) / kKvSplit;
    const std::unique_ptr<Tree> tree = plan_tree(*batch, r);
    const int run = all <= 16 ? std::min(shape->kv_heads, kTilesPerItem) : 1;
    for (int g = 0; g < shape->kv_heads; g += run) {
      const int heads = std::min(run, shape->kv_heads - g), most = 16 * kTilesPerItem;
      for (int lane = 0; lane < all; lane += most) {
        const int lanes = std::min(most, all - lane);
        AttentionItem item{r, tree.get(), g, heads, lane, lanes, -1, splits, 0};
        if (!split) {
          table().attend(*shape, pages, *batch, item, q, stride, out, stride, nullptr, *scratch);
          continue;
        }
        std::vector<float> partials(splits * item.tiles() * partial);
        for (item.split = 0; item.split < splits; ++item.split) {
          table().attend(*shape, pages, *batch, item, q, stride, out, stride,
                         &partials[item.split * item.tiles() * partial], *scratch);
        }
        table().join_splits(*shape, pages, *batch, item, partials.data(), out, stride, *scratch);
      }
    }
  }
  table().leave();
  table().free_scratch(scratch);
}

// Rows are shared out; each is drawn by one thread.
void pl_draw(const DrawCall* call) {
  const Table& ops = table();
  if (call->rows == 1) return ops.draw_row(*call, 0);
  const auto held = current_team();
  held->run([&](int) {
    for (int r; (r = held->next_task()) < call->rows;) ops.draw_row(*call, r);
  });
}

void pl_candidates(const CandidatesCall* call) {
  const Table& ops = table();
  // Waking another thread takes as long as some 100,000 logits, and few drafts have more.
  if (call->rows == 1 || call->rows * call->vocab < kSharedLogits) {
    for (int64_t r = 0; r < call->rows; ++r) ops.candidates_row(*call, r);
    return;
  }
  const auto held = current_team();
  held->run([&](int) {
    for (int r; (r = held->next_task()) < call->rows;) ops.candidates_row(*call, r);
  });
}

// By the caller alone: it is for samples, whose cost is to be the same whatever else the machine
// does. `out` has ids [P, K], behind them probs [P, K], behind them tails [P].
void pl_likeliest(const float* logits, int64_t vocab, const int64_t* places, int64_t count,
                  int64_t top, void* out) {
  int32_t* ids = static_cast<int32_t*>(out);
  _Float16* probs = reinterpret_cast<_Float16*>(ids + count * top);
  const LikeliestCall call{logits, vocab, places, top, ids, probs, probs + count * top};
  for (int64_t p = 0; p < count; ++p) table().likeliest_row(call, p);
}

// ---- decoder ---------------------------------------------------------------------------------

struct LayerPointers {
  Source qkv[3];
  Source o;
  Source gate_up[2];
  Source down;
  const float *input_norm, *post_norm, *q_norm, *k_norm;
  const float *qkv_bias, *o_bias, *gate_up_bias, *down_bias;
  int window;
};

void* pl_decoder_new(const DecoderConfig* config) {
  return new Decoder(*config, table(), current_team());
}

void pl_decoder_free(void* decoder) { delete static_cast<Decoder*>(decoder); }

// Packs one layer and lets go of the file's pages that held it.
void pl_decoder_layer(void* decoder, const DecoderConfig* c, int index, const LayerPointers* p) {
  Decoder& d = *static_cast<Decoder*>(decoder);
  Layer& layer = d.layers[index];
  const int q_size = c->heads * c->head_size;
  const Type type = c->weight_type;
  layer.qkv = pack_weight(d.table(), type, p->qkv, 3, c->hidden, false, p->qkv_bias);
  layer.o = pack_weight(d.table(), type, &p->o, 1, q_size, false, p->o_bias);
  layer.gate_up = pack_weight(d.table(), type, p->gate_up, 2, c->hidden, true, p->gate_up_bias);
  layer.down = pack_weight(d.table(), type, &p->down, 1, c->inner, false, p->down_bias);
  layer.input_norm = floats(p->input_norm, c->hidden);
  layer.post_norm = floats(p->post_norm, c->hidden);
  layer.q_norm = floats(p->q_norm, c->head_size);
  layer.k_norm = floats(p->k_norm, c->head_size);
  layer.window = p->window;
}

void pl_decoder_ends(void* decoder, const DecoderConfig* c, const Source* embedding,
                     const Source* head, const float* norm) {
  Decoder& d = *static_cast<Decoder*>(decoder);
  d.embedding = *embedding;
  d.head = pack_weight(d.table(), c->weight_type, head, 1, c->hidden, false, nullptr);
  d.final_norm = floats(norm, c->hidden);
}

void pl_decoder_forward(void* decoder, const Step* step, float* residuals) {
  static_cast<Decoder*>(decoder)->forward(*step, residuals);
}

void pl_decoder_logits(void* decoder, const float* residuals, const int64_t* rows, int count,
                       float* out) {
  static_cast<Decoder*>(decoder)->logits(residuals, rows, count, out);
}

void pl_drop_file_pages(const void* data, size_t bytes) { drop_file_pages(data, bytes); }

}  // extern "C"
#pragma GCC visibility pop
