// A Llama-type decoder's forward pass as one call: every thread walks through all layers.
#pragma once

#include <memory>
#include <vector>

#include "pack.h"
#include "table.h"
#include "team.h"
#include "tree.h"

namespace paceline {

struct DecoderConfig {
  int hidden;
  int inner;
  int layers;
  int heads;
  int kv_heads;
  int head_size;
  int vocab;
  int block_size;
  float eps;
  Type weight_type;
  Type kv_type;
};

struct Layer {
  OwnedWeight qkv, o, gate_up, down;
  std::vector<float> input_norm, post_norm;
  std::vector<float> q_norm, k_norm;  // empty without
  int window = 0;
};

// One step. Tokens of all rows lie behind each other; cos_sin is [positions, 2, D].
struct Step {
  int tokens;
  const int64_t* token_ids;
  const int64_t* positions;
  const int64_t* slots;  // page * T + offset
  const float* cos_sin;
  uint8_t* kv;           // [P, L, 2, G, T, D]
  Batch batch;
  const uint8_t* skips;  // [L, 2] whether a layer's attention and its MLP are left out, or null
};

class Decoder {
 public:
  Decoder(const DecoderConfig& config, const Table& table, std::shared_ptr<Team> team);
  ~Decoder();

  const Table& table() const { return table_; }

  std::vector<Layer> layers;
  std::vector<float> final_norm;
  OwnedWeight head;
  Source embedding{};  // stays where it is: only rows in use are read

  // residuals [tokens, hidden] of the last layer.
  void forward(const Step& step, float* residuals);

  // logits [count, vocab] of rows of `residuals`.
  void logits(const float* residuals, const int64_t* rows, int count, float* out);

 private:
  struct Source32 {
    const float* data;
    ptrdiff_t stride;
    const int64_t* rows;       // which ones, or null for all
    const float* norm_weight;  // or null
  };

  void plan_attention(const Batch& batch);
  void prepare(int thread, const Source32& source, int rows, int size, const PackedWeight& weight,
               Operand& operand);
  void multiply(int thread, const Source32& source, int rows, const PackedWeight& weight,
                Epilogue epilogue, float* out, ptrdiff_t out_stride);
  void write_heads(int thread, const Step& step, const Layer& layer, const Pages& pages);
  void attend(int thread, const Step& step, const Layer& layer, const Pages& pages);

  const DecoderConfig config_;
  const Table& table_;
  const std::shared_ptr<Team> held_;
  Team& team_;
  std::vector<ThreadScratch*> scratch_;
  std::vector<HugeBuffer> own_operands_;  // per thread, for few rows
  HugeBuffer operand_;                    // shared, for many
  HugeBuffer scales_;
  HugeBuffer qkv_, attended_, inner_;
  std::vector<std::unique_ptr<Tree>> trees_;  // by row
  std::vector<AttentionItem> items_;
  std::vector<float> partials_;
  bool has_splits_ = false;
};

// Grows a buffer; its content is lost.
inline uint8_t* reserve(HugeBuffer& buffer, size_t bytes) {
  if (buffer.size() < bytes) buffer = HugeBuffer(bytes);
  return buffer.data();
}

}  // namespace paceline
