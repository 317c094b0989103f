// Compiled once per instruction set, with PACELINE_ISA set to its name.
#include "attention.h"
#include "candidates.h"
#include "likeliest.h"
#include "product.h"
#include "rows.h"
#include "table.h"

namespace paceline {
namespace PACELINE_ISA {
namespace {

struct Scratch {
  std::vector<Tile> tiles;
  AttentionScratch attention;
};

Scratch& in(ThreadScratch& scratch) { return reinterpret_cast<Scratch&>(scratch); }

// The part of the tokens' side that stays in the second-level cache beside the weights.
constexpr size_t kOperandBytes = 1536 << 10;

void write_tile(const Product& p, int panel, int row0, int rows, Tile& c) {
  finish_tile(*p.weight, panel, p.operand.scales ? p.operand.scales + row0 : nullptr, rows, c);
  const bool is_gated = p.epilogue == Epilogue::kGate;
  const int first = panel * (is_gated ? 16 : kPanel);
  const int outputs = is_gated ? p.weight->outputs / 2 : p.weight->outputs;
  for (int r = 0; r < rows; ++r) {
    float* out = p.out + (row0 + r) * p.out_stride + first;
    if (is_gated) {
      const f32x16 v = silu(load(c.f32[r])) * load(c.f32[r] + 16);
      store_lanes(out, v, outputs - first < 16 ? outputs - first : 16);
      continue;
    }
    for (int h = 0; h < kPanel && first + h < outputs; h += 16) {
      const int n = outputs - first - h < 16 ? outputs - first - h : 16;
      f32x16 v = load(c.f32[r] + h);
      if (p.epilogue == Epilogue::kAdd) v += load_lanes(out + h, n);
      store_lanes(out + h, v, n);
    }
  }
}

void product_of_rows(Team& team, int thread, const Product& p, int begin, int end, Scratch& s) {
  const PackedWeight& w = *p.weight;
  const int row_bytes = w.padded * bytes_of(w.type);
  const int blocks = (end - begin + kRowBlock - 1) / kRowBlock;
  const size_t per_input = size_t(end - begin) * bytes_of(w.type);
  int chunk = w.padded;
  if (size_t(end - begin) * row_bytes > kOperandBytes && blocks > 1) {
    const int cuts = int((per_input * w.padded + kOperandBytes - 1) / kOperandBytes);
    chunk = round_up((w.padded + cuts - 1) / cuts, 64);
  }
  const auto rows_of = [&](int block) {
    const int left = end - begin - block * kRowBlock;
    return left < kRowBlock ? left : kRowBlock;
  };
  if (chunk >= w.padded) {
    if (s.tiles.empty()) s.tiles.resize(1);
    // Runs of panels, so that weights stream; several per thread, so that a late one helps out.
    const int run = w.panels / (team.size() * 4) > 1 ? w.panels / (team.size() * 4) : 1;
    for (int task; (task = team.next_task()) * run < w.panels;) {
      const int last = (task + 1) * run < w.panels ? (task + 1) * run : w.panels;
      for (int panel = task * run; panel < last; ++panel) {
        for (int b = 0; b < blocks; ++b) {
          const int row0 = begin + b * kRowBlock;
          tile_product(w, panel, p.operand, row0, rows_of(b), 0, w.padded, b == 0, s.tiles[0],
                       false);
          write_tile(p, panel, row0, rows_of(b), s.tiles[0]);
        }
      }
    }
    return;
  }
  const int first = w.panels * thread / team.size(), last = w.panels * (thread + 1) / team.size();
  if (s.tiles.size() < size_t(last - first) * blocks) s.tiles.resize(size_t(last - first) * blocks);
  for (int k = 0; k < w.padded; k += chunk) {
    const int stop = k + chunk < w.padded ? k + chunk : w.padded;
    for (int panel = first; panel < last; ++panel) {
      for (int b = 0; b < blocks; ++b) {
        const int row0 = begin + b * kRowBlock;
        Tile& tile = s.tiles[size_t(panel - first) * blocks + b];
        tile_product(w, panel, p.operand, row0, rows_of(b), k, stop, b == 0, tile, k > 0);
        if (stop == w.padded) write_tile(p, panel, row0, rows_of(b), tile);
      }
    }
  }
}

void product(Team& team, int thread, const Product& p, ThreadScratch& scratch) {
  product_of_rows(team, thread, p, 0, p.rows, in(scratch));
}

}  // namespace

extern const Table table;
const Table table = {
    .name = PACELINE_NAME,
    .words = kWords,
    .new_scratch = [] { return reinterpret_cast<ThreadScratch*>(new Scratch); },
    .free_scratch = [](ThreadScratch* s) { delete reinterpret_cast<Scratch*>(s); },
    .enter =
        [] {
#if defined(__AMX_TILE__)
          forget_tiles();
#endif
        },
    .leave =
        [] {
#if defined(__AMX_TILE__)
          _tile_release();
#endif
        },
    .product = product,
    .prepare_row = prepare_row,
    .rms_norm = rms_norm,
    .rotate = rotate,
    .store_kv = store_kv,
    .widen = widen,
    .partial_floats = [](const AttentionShape& s) { return state_floats(padded_head(s)); },
    .attend = [](const AttentionShape& s, const Pages& pages, const Batch& batch,
                 const AttentionItem& item, const float* q, ptrdiff_t q_stride, float* out,
                 ptrdiff_t out_stride, float* partials, ThreadScratch& scratch) {
      attend(s, pages, batch, item, q, q_stride, out, out_stride, partials, in(scratch).attention);
    },
    .join_splits = [](const AttentionShape& s, const Pages& pages, const Batch& batch,
                      const AttentionItem& item, float* partials, float* out, ptrdiff_t out_stride,
                      ThreadScratch& scratch) {
      join_splits(s, pages, batch, item, partials, out, out_stride, in(scratch).attention);
    },
    .draw_row = draw_row,
    .candidates_row = candidates_row,
    .likeliest_row = likeliest_row,
};

}  // namespace PACELINE_ISA
}  // namespace paceline
