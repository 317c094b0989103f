#include "decoder.h"

#include <algorithm>
#include <cmath>

namespace paceline {
namespace {

// Up to so many numbers each thread prepares all operands for itself, which costs less than
// sharing them out and waiting for each other.
constexpr int kOwnOperand = 16384;

constexpr int kLanesPerItem = kTilesPerItem * 16;

}  // namespace

Decoder::Decoder(const DecoderConfig& config, const Table& table, std::shared_ptr<Team> team)
    : layers(config.layers), config_(config), table_(table), held_(team), team_(*team) {
  const int most = std::max({config.hidden, config.inner, config.heads * config.head_size});
  const size_t bytes = size_t(kOwnOperand + 32 * round_up(most, 64)) * 4 + 32 * 128 + 4096;
  for (int i = 0; i < team_.size(); ++i) {
    scratch_.push_back(table.new_scratch());
    own_operands_.emplace_back(bytes);
  }
}

Decoder::~Decoder() {
  for (ThreadScratch* scratch : scratch_) table_.free_scratch(scratch);
}

void Decoder::prepare(int thread, const Source32& source, int rows, int size,
                      const PackedWeight& weight, Operand& operand) {
  operand.stride = operand_stride(weight);
  const auto prepare_row = [&](int r) {
    const float* x = source.data + (source.rows ? source.rows[r] : r) * source.stride;
    table_.prepare_row(weight.type, x, source.norm_weight, config_.eps, size, weight.padded,
                       operand.data + r * operand.stride, operand.scales + r);
  };
  if (rows * weight.padded <= kOwnOperand || team_.size() == 1) {
    if (rows * weight.padded <= kOwnOperand) {
      operand.scales = reinterpret_cast<float*>(own_operands_[thread].data());
      operand.data = own_operands_[thread].data() + 4096;
    }
    for (int r = 0; r < rows; ++r) prepare_row(r);
    return;
  }
  constexpr int kRun = 4;
  for (int task; (task = team_.next_task()) * kRun < rows;) {
    for (int r = task * kRun; r < std::min(rows, (task + 1) * kRun); ++r) prepare_row(r);
  }
  team_.barrier();
}

void Decoder::multiply(int thread, const Source32& source, int rows, const PackedWeight& weight,
                       Epilogue epilogue, float* out, ptrdiff_t out_stride) {
  Operand operand{operand_.data(), 0, reinterpret_cast<float*>(scales_.data())};
  prepare(thread, source, rows, weight.inputs, weight, operand);
  table_.product(team_, thread, {&weight, operand, rows, epilogue, out, out_stride},
                 *scratch_[thread]);
  team_.barrier();
}

// Rotates queries and keys, and stores keys and values in their pages.
void Decoder::write_heads(int thread, const Step& step, const Layer& layer, const Pages& pages) {
  const auto& c = config_;
  const int heads = c.heads + 2 * c.kv_heads, size = c.head_size;
  const ptrdiff_t stride = ptrdiff_t(heads) * size;
  (void)thread;
  constexpr int kRun = 4;
  for (int task; (task = team_.next_task()) * kRun < step.tokens;) {
    for (int n = task * kRun; n < std::min(step.tokens, (task + 1) * kRun); ++n) {
      float* token = reinterpret_cast<float*>(qkv_.data()) + n * stride;
      const float* angles = step.cos_sin + step.positions[n] * 2 * size;
      uint8_t* page = pages.pages + step.slots[n] / c.block_size * pages.page_bytes;
      const int64_t offset = step.slots[n] % c.block_size;
      for (int h = 0; h < heads; ++h) {
        float* x = token + h * size;
        const bool is_query = h < c.heads, is_key = !is_query && h < c.heads + c.kv_heads;
        const auto& norm = is_query ? layer.q_norm : layer.k_norm;
        if ((is_query || is_key) && !norm.empty()) table_.rms_norm(x, norm.data(), c.eps, size, x);
        if (is_query || is_key) table_.rotate(x, angles, size);
        if (is_query) continue;
        const int64_t slot = (int64_t(h - c.heads) * c.block_size + offset) * size;
        table_.store_kv(x, size, c.kv_type, page + slot * bytes_of(c.kv_type));
      }
    }
  }
}

void Decoder::plan_attention(const Batch& batch) {
  const int group = config_.heads / config_.kv_heads;
  items_.clear();
  has_splits_ = false;
  const auto lanes_of = [&](int r) { return (batch.cu_q[r + 1] - batch.cu_q[r]) * group; };
  // Heads beside each other are read together: pages are far apart, heads are not.
  const auto run_of = [&](int r) {
    return lanes_of(r) <= 16 ? std::min(config_.kv_heads, kTilesPerItem) : 1;
  };
  trees_.clear();
  for (int r = 0; r < batch.rows; ++r) trees_.push_back(plan_tree(batch, r));
  int whole = 0;
  for (int r = 0; r < batch.rows; ++r) {
    whole += (config_.kv_heads + run_of(r) - 1) / run_of(r) *
             ((lanes_of(r) + kLanesPerItem - 1) / kLanesPerItem);
  }
  // Splitting never changes a result, so it is done where there would be too little to share out.
  const bool is_small = team_.size() > 1 && whole < 4 * team_.size();
  int partials = 0;
  for (int r = 0; r < batch.rows; ++r) {
    const int all = lanes_of(r), run = run_of(r);
    const int splits = (batch.kv_lens[r] + kKvSplit - 1) / kKvSplit;
    for (int g = 0; g < config_.kv_heads; g += run) {
      const int heads = std::min(run, config_.kv_heads - g);
      if (is_small && splits > 1 && all <= kLanesPerItem) {
        for (int s = 0; s < splits; ++s) {
          items_.push_back({r, trees_[r].get(), g, heads, 0, all, s, splits, partials});
        }
        partials += splits * items_.back().tiles();
        has_splits_ = true;
        continue;
      }
      for (int lane = 0; lane < all; lane += kLanesPerItem) {
        const int lanes = std::min(kLanesPerItem, all - lane);
        items_.push_back({r, trees_[r].get(), g, heads, lane, lanes, -1, 1, 0});
      }
    }
  }
  // The longest first, so that threads finish together.
  const auto cost = [&](const AttentionItem& item) {
    const int q_len = batch.cu_q[item.row + 1] - batch.cu_q[item.row];
    const int reach = batch.kv_lens[item.row] - q_len + (item.lane + item.lanes - 1) % q_len;
    return int64_t(item.lanes) * item.kv_heads * (item.split < 0 ? reach : kKvSplit);
  };
  std::stable_sort(items_.begin(), items_.end(),
                   [&](const auto& a, const auto& b) { return cost(a) > cost(b); });
  const AttentionShape shape{config_.heads, config_.kv_heads, config_.head_size,
                             config_.block_size, 0, 0, config_.kv_type};
  partials_.resize(partials * table_.partial_floats(shape));
}

void Decoder::attend(int thread, const Step& step, const Layer& layer, const Pages& pages) {
  const auto& c = config_;
  const AttentionShape shape{c.heads, c.kv_heads, c.head_size, c.block_size,
                             1.0f / std::sqrt(float(c.head_size)), layer.window, c.kv_type};
  const float* q = reinterpret_cast<const float*>(qkv_.data());
  float* out = reinterpret_cast<float*>(attended_.data());
  const ptrdiff_t q_stride = ptrdiff_t(c.heads + 2 * c.kv_heads) * c.head_size;
  const ptrdiff_t out_stride = ptrdiff_t(c.heads) * c.head_size;
  const size_t partial = table_.partial_floats(shape);
  const int count = int(items_.size());
  for (int i; (i = team_.next_task()) < count;) {
    const AttentionItem& item = items_[i];
    const int at = item.partial + item.split * item.tiles();
    float* partials = item.split < 0 ? nullptr : &partials_[at * partial];
    table_.attend(shape, pages, step.batch, item, q, q_stride, out, out_stride, partials,
                  *scratch_[thread]);
  }
  team_.barrier();
  if (!has_splits_) return;
  for (int i; (i = team_.next_task()) < count;) {
    const AttentionItem& item = items_[i];
    if (item.split != 0) continue;
    table_.join_splits(shape, pages, step.batch, item, &partials_[item.partial * partial], out,
                       out_stride, *scratch_[thread]);
  }
  team_.barrier();
}

void Decoder::forward(const Step& step, float* x) {
  const auto& c = config_;
  const int n = step.tokens, q_size = c.heads * c.head_size;
  const int qkv_size = q_size + 2 * c.kv_heads * c.head_size;
  // Tiles of 16 rows are read whole, so there is memory behind the last row.
  const size_t rows = round_up(n, kRowBlock);
  const int widest = round_up(std::max({c.hidden, c.inner, q_size}), 64);
  reserve(operand_, rows * (widest * bytes_of(c.weight_type) + 128));
  reserve(scales_, rows * sizeof(float));
  float* qkv = reinterpret_cast<float*>(reserve(qkv_, rows * qkv_size * sizeof(float)));
  float* attended = reinterpret_cast<float*>(reserve(attended_, rows * q_size * sizeof(float)));
  float* inner = reinterpret_cast<float*>(reserve(inner_, rows * c.inner * sizeof(float)));
  plan_attention(step.batch);
  const ptrdiff_t layer_bytes = ptrdiff_t(2) * c.kv_heads * c.block_size * c.head_size *
                                bytes_of(c.kv_type);
  team_.run([&](int thread) {
    table_.enter();
    for (int i; (i = team_.next_task()) < n;) {
      const size_t row_bytes = size_t(c.hidden) * bytes_of(embedding.type);
      table_.widen(embedding.data + step.token_ids[i] * row_bytes, embedding.type, c.hidden,
                   x + i * c.hidden);
    }
    team_.barrier();
    for (int l = 0; l < c.layers; ++l) {
      const Layer& layer = layers[l];
      const Pages pages{step.kv + l * layer_bytes, c.layers * layer_bytes};
      if (!step.skips || !step.skips[2 * l]) {
        multiply(thread, {x, c.hidden, nullptr, layer.input_norm.data()}, n, layer.qkv.weight,
                 Epilogue::kStore, qkv, qkv_size);
        write_heads(thread, step, layer, pages);
        team_.barrier();
        attend(thread, step, layer, pages);
        multiply(thread, {attended, q_size, nullptr, nullptr}, n, layer.o.weight, Epilogue::kAdd,
                 x, c.hidden);
      }
      if (step.skips && step.skips[2 * l + 1]) continue;
      multiply(thread, {x, c.hidden, nullptr, layer.post_norm.data()}, n, layer.gate_up.weight,
               Epilogue::kGate, inner, c.inner);
      multiply(thread, {inner, c.inner, nullptr, nullptr}, n, layer.down.weight, Epilogue::kAdd, x,
               c.hidden);
    }
    table_.leave();
  });
}

void Decoder::logits(const float* residuals, const int64_t* rows, int count, float* out) {
  reserve(operand_, size_t(round_up(count, kRowBlock)) * (round_up(config_.hidden, 64) * 4 + 128));
  reserve(scales_, round_up(count, kRowBlock) * sizeof(float));
  team_.run([&](int thread) {
    table_.enter();
    multiply(thread, {residuals, config_.hidden, rows, final_norm.data()}, count, head.weight,
             Epilogue::kStore, out, config_.vocab);
    table_.leave();
  });
}

}  // namespace paceline
