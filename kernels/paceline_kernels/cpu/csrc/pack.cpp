#include "pack.h"

#include <cmath>
#include <cstring>
#include <vector>

namespace paceline {
namespace {

// The source row that output `o` of the packed weight comes from, or -1 for padding.
int source_row(int o, int rows, bool is_gated) {
  if (!is_gated) return o < rows ? o : -1;
  const int inner = rows / 2, within = o % kPanel;
  const int feature = o / kPanel * 16 + within % 16;
  if (feature >= inner) return -1;
  return within < 16 ? feature : inner + feature;
}

uint16_t bf16_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return uint16_t((bits >> 16) | 0x40);
  return uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

void put_bf16(const PackedWeight& w, const float* row, int column, uint8_t* panel) {
  for (int k = 0; k < w.inputs; ++k) {
    const uint16_t v = bf16_of(row[k]);
    std::memcpy(panel + w.word_offset(k / 2, column) + k % 2 * 2, &v, 2);
  }
}

void put_i8(const PackedWeight& w, const float* row, int column, uint8_t* panel, float* scale,
            int32_t* sum) {
  float bound = 0.0f;
  for (int k = 0; k < w.inputs; ++k) bound = std::fmax(bound, std::fabs(row[k]));
  *scale = bound / 127.0f;
  const float factor = bound > 0.0f ? 127.0f / bound : 0.0f;
  for (int k = 0; k < w.inputs; ++k) {
    const int q = int(std::nearbyint(row[k] * factor));
    *sum += 128 * q;
    panel[w.word_offset(k / 4, column) + k % 4] = uint8_t(int8_t(q));
  }
}

}  // namespace

OwnedWeight pack_weight(const Table& table, Type type, const Source* sources, int count, int inputs,
                        bool is_gated, const float* biases) {
  int rows = 0;
  for (int i = 0; i < count; ++i) rows += sources[i].rows;
  OwnedWeight owned;
  PackedWeight& w = owned.weight;
  w.type = type;
  w.outputs = rows;
  w.inputs = inputs;
  w.padded = padded_inputs(type, inputs);
  w.words = table.words;
  w.panels = is_gated ? (rows / 2 + 15) / 16 : (rows + kPanel - 1) / kPanel;
  const size_t data = w.panel_bytes() * w.panels, outputs = size_t(w.panels) * kPanel;
  const size_t side = outputs * 4;
  owned.memory = HugeBuffer(data + side * ((type == Type::kI8 ? 2 : 0) + (biases ? 1 : 0)));
  w.data = owned.memory.data();
  uint8_t* behind = w.data + data;
  if (type == Type::kI8) {
    w.scales = reinterpret_cast<float*>(behind);
    w.sums = reinterpret_cast<int32_t*>(behind + side);
    behind += 2 * side;
  }
  if (biases) w.bias = reinterpret_cast<float*>(behind);
  std::vector<float> row(inputs);
  for (int o = 0; o < int(outputs); ++o) {
    int from = source_row(o, rows, is_gated);
    if (from < 0) continue;
    if (biases) w.bias[o] = biases[from];
    const Source* source = sources;
    while (from >= source->rows) from -= (source++)->rows;
    table.widen(source->data + size_t(from) * inputs * bytes_of(source->type), source->type, inputs,
                row.data());
    uint8_t* panel = w.data + (o / kPanel) * w.panel_bytes();
    const int column = o % kPanel;
    if (type == Type::kF32) {
      float* to = reinterpret_cast<float*>(panel) + column;
      for (int k = 0; k < inputs; ++k) to[size_t(k) * kPanel] = row[k];
    } else if (type == Type::kBF16) {
      put_bf16(w, row.data(), column, panel);
    } else {
      put_i8(w, row.data(), column, panel, w.scales + o, w.sums + o);
    }
  }
  return owned;
}

}  // namespace paceline
