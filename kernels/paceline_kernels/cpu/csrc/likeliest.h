// The likeliest tokens of a row's distribution at temperature 1, with their probabilities and the
// mass of all others. Included by kernels.cpp.
#pragma once

#include "candidates.h"

namespace paceline {
namespace PACELINE_ISA {

// No result is a NaN. A row without a distribution, one with a NaN or with nothing but -inf, names
// the first tokens with a probability of 0, and all others have 1.
inline void likeliest_row(const LikeliestCall& call, int64_t p) {
  DrawScratch& s = draw_scratch();
  const int vocab = int(call.vocab), top = int(call.top);
  int32_t* ids = call.ids + p * top;
  _Float16* probs = call.probs + p * top;
  const float* x = call.logits + call.places[p] * vocab;
  float maxima[kGroups];
  const bool has_numbers = find_maxima(x, vocab, maxima);
  float best = *std::max_element(maxima, maxima + kGroups);
  if (!has_numbers || best == -INFINITY) {
    std::iota(ids, ids + top, 0);
    std::fill_n(probs, top, _Float16(0));
    call.tails[p] = 1;
    return;
  }
  if (best == INFINITY) {
    x = limit(x, vocab, s);
    find_maxima(x, vocab, maxima);
    best = 0;
  }
  const float border =
      top < kGroups ? border_of(maxima, top) : kth_largest(x, vocab, top, s.candidates);
  collect(x, vocab, border, s.candidates);
  const float* values = s.candidates.values.data();
  order_best(values, s.candidates.count, top, s.order);
  const double log_total = log_sum(x, vocab, best);
  double named = 0;
  for (int i = 0; i < top; ++i) {
    const double prob = std::exp(double(values[s.order[i]]) - best - log_total);
    ids[i] = s.candidates.tokens[s.order[i]];
    probs[i] = _Float16(float(prob));
    named += prob;
  }
  // Rounding can bring the sum above 1.
  call.tails[p] = _Float16(float(std::max(0.0, 1.0 - named)));
}

}  // namespace PACELINE_ISA
}  // namespace paceline
