// Draws one token of a row by the coupled rule: argmax(logits + Gumbel(seed, stream, position)).
//
// The order of processing is that of services/paceline/engine/sampling/reference.py, which these
// functions agree with token for token: every logit goes through the same float32 operations, and
// noise has the same bits. Included by kernels.cpp.
#pragma once

#include <cfloat>
#include <numeric>

#include "draw.h"
#include "noise.h"
#include "truncate.h"

namespace paceline {
namespace PACELINE_ISA {

// Buffers of one thread, as large as its largest row so far.
struct DrawScratch {
  std::vector<float> row;
  Candidates candidates;
  std::vector<int32_t> counts;  // zeros between calls
  std::vector<int32_t> order;
};

inline DrawScratch& draw_scratch() {
  thread_local DrawScratch scratch;
  return scratch;
}

// A product that is rounded by itself: the compiler must not fuse it with a sum.
inline float rounded(float product) {
  volatile float kept = product;
  return kept;
}

inline float penalised(float x, const DrawRow& p, int count) {
  if (p.repetition_penalty != 1.0) {
    const float penalty = float(p.repetition_penalty);
    x = x < 0 ? rounded(x * penalty) : x / penalty;
  }
  if (count == 0) return x;
  return x - float(p.presence_penalty) - rounded(float(p.frequency_penalty) * float(count));
}

// Copies the row and punishes the tokens that were seen; takes time in proportion to their number.
inline const float* penalise(const float* logits, int vocab, const DrawRow& p, const int64_t* seen,
                             DrawScratch& s) {
  std::copy_n(logits, vocab, s.row.begin());
  if (int(s.counts.size()) < vocab) s.counts.resize(vocab);
  const int64_t *prompt = seen + p.tokens_begin, *output = prompt + p.num_prompt;
  const int64_t* end = output + p.num_output;
  const auto for_each = [&](const int64_t* from, const int64_t* to, auto&& body) {
    for (; from < to; ++from) {
      if (*from >= 0 && *from < vocab) body(int(*from));
    }
  };
  for_each(output, end, [&](int token) { ++s.counts[token]; });
  // The prompt counts for the repetition penalty only: with a count of 0 nothing else changes.
  for_each(p.repetition_penalty != 1.0 ? prompt : output, end, [&](int token) {
    if (s.counts[token] < 0) return;
    s.row[token] = penalised(s.row[token], p, s.counts[token]);
    s.counts[token] = -1;
  });
  for_each(prompt, end, [&](int token) { s.counts[token] = 0; });
  return s.row.data();
}

// The row's logits after penalties, in their place or in that of the scratch, which is as large.
inline const float* processed(const float* logits, int vocab, const DrawRow& p,
                              const int64_t* seen, DrawScratch& s) {
  if (int(s.row.size()) < whole_lanes(vocab)) s.row.resize(whole_lanes(vocab));
  const bool has_penalties =
      p.repetition_penalty != 1.0 || p.presence_penalty != 0.0 || p.frequency_penalty != 0.0;
  return has_penalties ? penalise(logits, vocab, p, seen, s) : logits;
}

// The largest logit and the first token that has it; is_drawable unless that is NaN or -inf.
struct Best {
  float value = -INFINITY;
  int token = 0;
  bool is_drawable = true;
};

inline Best find_best(const float* x, int vocab) {
  constexpr int kBlock = 1024;
  constexpr int kParts = 64 / kNative;
  Best best;
  i32xn is_nan = {};
  int block = 0;
  for (int first = 0; first < vocab; first += kBlock) {
    f32xn most[kParts];
    for (f32xn& part : most) part = f32xn{} - INFINITY;
    for (int i = first; i < std::min(vocab, first + kBlock); i += 64) {
      float copy[64];
      const float* from = x + i;
      if (vocab - i < 64) {
        std::fill(std::copy_n(from, vocab - i, copy), copy + 64, -INFINITY);
        from = copy;
      }
      for (int j = 0; j < kParts; ++j) {
        const f32xn v = load_as<f32xn>(from + j * kNative);
        most[j] = v > most[j] ? v : most[j];
        is_nan |= v != v;
      }
    }
    for (const f32xn& part : most) {
      for (int i = 0; i < kNative; ++i) {
        if (part[i] > best.value) best.value = part[i], block = first;
      }
    }
  }
  best.is_drawable = bits_of(is_nan) == 0 && best.value > -INFINITY;
  if (best.is_drawable) best.token = int(std::find(x + block, x + vocab, best.value) - x);
  return best;
}

// A row's logits shifted so that the best is 0, over its temperature.
struct Scaled {
  const float* logits;
  int vocab;
  float best;
  float temperature;

  // 16 lanes from i on; impossible behind the end.
  f32x16 at(int i) const {
    return (load_or(logits + i, vocab - i, -INFINITY) - best) / temperature;
  }
};

// The best token after noise: whoever leads in the end is not behind it.
inline Leader noisy_best(const NoiseKey& key, int token) {
  int32_t tokens[kLanes];
  uint32_t words[kLanes];
  std::fill_n(tokens, kLanes, token);
  words_of(key, tokens, words);
  return {gumbel(words[0]), token};
}

inline int draw_from_all(const Scaled& row, const NoiseKey& key, Leader leader) {
  for (int first = 0; first < row.vocab; first += kNoiseBlock) {
    float x[kNoiseBlock];
    bool is_open = false;
    for (int i = 0; i < kNoiseBlock; i += kLanes) {
      const f32x16 v = first + i < row.vocab ? row.at(first + i) : splat(-INFINITY);
      is_open |= may_lead(v, leader);
      store(x + i, v);
    }
    if (!is_open) continue;
    uint32_t words[kNoiseBlock];
    words_of_block(key, first, words);
    for (int i = 0; i < kNoiseBlock; i += kLanes) {
      offer_lanes(leader, x + i, words + i, [&](int lane) { return first + i + lane; });
    }
  }
  return leader.token;
}

inline int draw_from(const Candidates& c, const NoiseKey& key, Leader leader) {
  for (int i = 0; i < c.count; i += kLanes) {
    if (!may_lead(load(&c.values[i]), leader)) continue;
    uint32_t words[kLanes];
    words_of(key, &c.tokens[i], words);
    offer_lanes(leader, &c.values[i], words, [&](int lane) { return c.tokens[i + lane]; });
  }
  return leader.token;
}

// Top-k, then top-p, then min-p, each on what is left.
inline void truncate(const Scaled& row, const DrawRow& p, DrawScratch& s) {
  const int whole = whole_lanes(row.vocab);
  // Punished logits are in this place already: lanes are read before they are written.
  float* x = s.row.data();
  for (int i = 0; i < whole; i += kLanes) store(x + i, row.at(i));
  const bool has_top_k = p.top_k > 0 && p.top_k < row.vocab, has_top_p = p.top_p < 1.0;
  const float floor = p.min_p > 0.0 ? float(std::log(double(float(p.min_p)))) : -INFINITY;
  float threshold = has_top_p ? -INFINITY : floor;
  double total = 0;
  if (has_top_k) {
    threshold = std::max(threshold, kth_largest(x, row.vocab, int(p.top_k), s.candidates));
  } else if (has_top_p) {
    // All tokens below it together have less than what may be left out.
    total = mass(x, whole);
    threshold = float(std::log((1.0 - p.top_p) * total / row.vocab) - 0.01);
  }
  collect(x, row.vocab, threshold, s.candidates);
  if (!has_top_p) return;
  if (has_top_k) total = mass(s.candidates.values.data(), whole_lanes(s.candidates.count));
  const NucleusEnd end = find_nucleus(s.candidates, (p.top_p - kReached) * total);
  int ties = end.ties;
  s.candidates.filter([&](f32x16 v) {
    const auto is_equal = [&](f32xn x) { return (x == end.value) & (x >= floor); };
    const auto is_above = [&](f32xn x) { return (x > end.value) & (x >= floor); };
    uint32_t equal = bits_where(v, is_equal), taken = 0;
    for (; equal && ties > 0; equal &= equal - 1, --ties) taken |= equal & -equal;
    return bits_where(v, is_above) | taken;
  });
}

// What a row with logits of +inf comes to: all others are impossible. In the scratch's row, which
// may be the one that is given.
inline const float* limit(const float* x, int vocab, DrawScratch& s) {
  if (int(s.row.size()) < whole_lanes(vocab)) s.row.resize(whole_lanes(vocab));
  const auto of = [](float l) { return l == INFINITY ? 0 : -INFINITY; };
  std::transform(x, x + vocab, s.row.data(), of);
  return s.row.data();
}

inline int draw_token(const float* logits, int vocab, const DrawRow& p, const int64_t* seen) {
  DrawScratch& s = draw_scratch();
  const float* x = processed(logits, vocab, p, seen, s);
  Best best = find_best(x, vocab);
  if (!best.is_drawable) return -1;
  if (p.temperature == 0.0) return best.token;
  if (best.value == INFINITY) {
    x = limit(x, vocab, s);
    best.value = 0;
  }
  const Scaled row{x, vocab, best.value, float(std::max(p.temperature, double(FLT_MIN)))};
  const NoiseKey key{p.seed, uint32_t(p.stream), uint32_t(p.position)};
  const bool is_whole = (p.top_k <= 0 || p.top_k >= vocab) && !(p.top_p < 1.0) && !(p.min_p > 0.0);
  if (is_whole) return draw_from_all(row, key, noisy_best(key, best.token));
  truncate(row, p, s);
  return draw_from(s.candidates, key, {-INFINITY, best.token});
}

// log of the sum of exponentials of x - best. Float sums of 1024 lanes' worth are added as doubles.
inline double log_sum(const float* x, int vocab, float best) {
  double total = 0;
  for (int first = 0; first < vocab; first += 1024) {
    const int end = std::min(vocab, first + 1024);
    f32x16 part = {};
    for (int i = first; i < end; i += kLanes) {
      part += exp2((load_or(x + i, end - i, -INFINITY) - best) * kLog2E);
    }
    total += sum(part);
  }
  return std::log(total);
}

// The places of the `wanted` largest of n values, falling, of equal ones the first ones first.
// Behind the values is padding up to whole lanes.
inline void order_best(const float* x, int n, int wanted, std::vector<int32_t>& order) {
  // Counting those that come before takes a fifth of sorting, which guesses its branches wrong.
  constexpr int kMostCounted = 256;
  order.resize(n);
  if (n > kMostCounted) {
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(order.begin(), order.begin() + wanted, order.end(),
                      [&](int a, int b) { return x[a] > x[b] || (x[a] == x[b] && a < b); });
    return;
  }
  for (int i = 0; i < n; ++i) {
    int before = 0;
    for (int j = 0; j < n; j += kLanes) {
      const f32x16 v = load(x + j);
      const uint32_t above = bits_where(v, [&](f32xn part) { return part > x[i]; });
      const uint32_t equal = bits_where(v, [&](f32xn part) { return part == x[i]; });
      const uint32_t first = i >= j + kLanes ? 0xFFFFu : i > j ? (1u << (i - j)) - 1 : 0;
      before += __builtin_popcount(above | (equal & first));
    }
    if (before < wanted) order[before] = i;
  }
}

// Log-probabilities of the unmodified logits: the drawn token's and the best ones', of equal ones
// the lower tokens first.
inline void write_logprobs(const DrawCall& call, int64_t r, int token) {
  DrawScratch& s = draw_scratch();
  const int vocab = int(call.vocab);
  const int wanted = int(std::min(call.params[r].num_logprobs, call.vocab));
  const float* logits = call.logits + r * vocab;
  const float best = find_best(logits, vocab).value;
  const double log_total = log_sum(logits, vocab, best);
  const auto logprob = [&](int t) { return float(double(logits[t]) - best - log_total); };
  call.logprobs[r] = logprob(token);
  collect(logits, vocab, kth_largest(logits, vocab, wanted, s.candidates), s.candidates);
  order_best(s.candidates.values.data(), s.candidates.count, wanted, s.order);
  for (int i = 0; i < wanted; ++i) {
    const int t = s.candidates.tokens[s.order[i]];
    call.best_tokens[r * call.most_logprobs + i] = t;
    call.best_logprobs[r * call.most_logprobs + i] = logprob(t);
  }
}

inline void draw_row(const DrawCall& call, int64_t r) {
  const DrawRow& p = call.params[r];
  const int token = draw_token(call.logits + r * call.vocab, int(call.vocab), p, call.seen);
  call.tokens[r] = token;
  if (token >= 0 && p.num_logprobs > 0) write_logprobs(call, r, token);
}

}  // namespace PACELINE_ISA
}  // namespace paceline
