// What a drafting model's logits propose for one row: its best tokens, in the order in which they
// are to be tried.
//
// The order of processing and the borders are those of
// services/paceline/engine/spec/candidates_reference.py. Behind the choice of the best tokens all
// is in double precision. Included by kernels.cpp.
#pragma once

#include "sampling.h"

namespace paceline {
namespace PACELINE_ISA {

// A row's best tokens in falling order, of equal ones the lower tokens first. Whole lanes: behind
// the last one are tokens 0 of logits that weigh nothing.
struct BestTokens {
  int count = 0;
  int32_t tokens[kMostBest] = {};
  double logits[kMostBest];  // less the best one
};

// Groups that a row is divided into, at least as many as there are best tokens.
constexpr int kGroups = 2 * kMostBest;

// The largest logit of each group; returns whether none is a NaN.
inline bool find_maxima(const float* x, int vocab, float* out) {
  constexpr int kParts = kGroups / kNative;
  f32xn most[kParts];
  for (f32xn& part : most) part = f32xn{} - INFINITY;
  i32xn is_nan = {};
  for (int first = 0; first < vocab; first += kGroups) {
    float copy[kGroups];
    const float* from = x + first;
    if (vocab - first < kGroups) {
      std::fill(std::copy_n(from, vocab - first, copy), copy + kGroups, -INFINITY);
      from = copy;
    }
    for (int j = 0; j < kParts; ++j) {
      const f32xn v = load_as<f32xn>(from + j * kNative);
      most[j] = v > most[j] ? v : most[j];
      is_nan |= v != v;
    }
  }
  std::memcpy(out, most, sizeof most);
  return bits_of(is_nan) == 0;
}

// What `wanted` < kGroups of the maxima are not below, of which none is a NaN: the largest such key,
// bit by bit, or one for which they are just as many. Keys are ordered as their numbers are.
inline float border_of(const float* maxima, int wanted) {
  constexpr int kParts = kGroups / kNative;
  constexpr uint32_t kSign = 0x80000000u;
  const auto key_of = [](auto bits) { return bits ^ ((bits >> 31) & 0x7FFFFFFF); };
  i32xn keys[kParts];
  for (int j = 0; j < kParts; ++j) keys[j] = key_of(load_as<i32xn>(maxima + j * kNative));
  uint32_t border = 0;
  for (uint32_t bit = kSign; bit; bit >>= 1) {
    const int32_t tried = int32_t((border | bit) ^ kSign);
    int count = 0;
    for (const i32xn& part : keys) count += __builtin_popcount(bits_of(part >= tried));
    if (count >= wanted) border |= bit;
    if (count == wanted) break;
  }
  const int32_t bits = key_of(int32_t(border ^ kSign));
  return load_as<float>(&bits);
}

// As many groups as wanted have a logit of at least the border of their maxima, so none of the best
// tokens is less. For 64 of 4,096 tokens that leaves about 90.
inline BestTokens best_tokens(const float* x, int vocab, int wanted, const float* maxima,
                              DrawScratch& s) {
  BestTokens out;
  const float best = *std::max_element(maxima, maxima + kGroups);
  collect(x, vocab, border_of(maxima, wanted), s.candidates);
  out.count = std::min(wanted, vocab);
  order_best(s.candidates.values.data(), s.candidates.count, out.count, s.order);
  std::fill_n(out.logits, kMostBest, -INFINITY);
  for (int i = 0; i < out.count; ++i) {
    out.tokens[i] = s.candidates.tokens[s.order[i]];
    out.logits[i] = double(s.candidates.values[s.order[i]]) - best;
  }
  return out;
}

// out = e^x of kMostBest numbers, none of them above 0; returns their sum.
inline double exp_all(const double* x, double* out) {
  double sum = 0;
  for (int i = 0; i < kMostBest; i += kDoubles) {
    const f64xn weights = exp(load_as<f64xn>(x + i));
    store_as(out + i, weights);
    for (int j = 0; j < kDoubles; ++j) sum += weights[j];
  }
  return sum;
}

// The draft's distribution over the best tokens: a prefix of them after top-k, top-p and min-p.
struct Kept {
  int count = 0;
  double logprobs[kMostBest];  // -inf behind the last one
  double probs[kMostBest];
};

inline Kept keep(const BestTokens& best, const DrawRow& p) {
  constexpr double kLeastTemperature = 1e-6;  // float32 logits differ by more, or are equal
  const double temperature = std::max(p.temperature, kLeastTemperature);
  const int most = p.top_k > 0 && p.top_k < best.count ? int(p.top_k) : best.count;
  Kept kept;
  double weights[kMostBest];
  std::fill_n(kept.logprobs, kMostBest, -INFINITY);
  for (int i = 0; i < most; ++i) kept.logprobs[i] = best.logits[i] / temperature;
  const double border = (p.top_p - kReached) * exp_all(kept.logprobs, weights);
  double total = weights[0];
  for (kept.count = 1; kept.count < most; total += weights[kept.count++]) {
    if (!(total < border) || weights[kept.count] < p.min_p) break;
  }
  const double log_total = std::log(total);
  for (int i = 0; i < kMostBest; ++i) {
    kept.logprobs[i] = i < kept.count ? kept.logprobs[i] - log_total : -INFINITY;
    kept.probs[i] = i < kept.count ? weights[i] / total : 0;
  }
  return kept;
}

// The likeliest tokens, as far as they are possible; with their probability in the whole row.
inline void write_likeliest(const BestTokens& best, double log_total, CandidatesRow& out) {
  for (; out.count < best.count; ++out.count) {
    const double prob = std::exp(best.logits[out.count] - log_total);
    if (!(prob > 0)) return;
    out.tokens[out.count] = best.tokens[out.count];
    out.confidences[out.count] = prob;
  }
}

// Adds the noise of the kept tokens to their log-probabilities.
inline void perturb(const NoiseKey& key, const BestTokens& best, int count, double* logprobs) {
  for (int i = 0; i < count; i += kLanes) {
    uint32_t words[kLanes];
    words_of(key, best.tokens + i, words);
    for (int j = i; j < std::min(count, i + kLanes); ++j) logprobs[j] += gumbel(words[j - i]);
  }
}

// The best of the kept tokens by their perturbed log-probabilities. What a draft draws itself is
// as likely as that; a guess of the target's draw is by how far it leads.
inline void write_race(const BestTokens& best, const DrawRow& p, int64_t lane, int most,
                       CandidatesRow& out) {
  const bool is_drawn = lane >= 0;
  const Kept kept = keep(best, p);
  double perturbed[kMostBest];
  std::copy_n(kept.logprobs, kMostBest, perturbed);
  perturb({p.seed, uint32_t(p.stream), uint32_t(p.position), is_drawn ? uint32_t(lane) : 0}, best,
          kept.count, perturbed);
  int order[kMostBest];
  std::iota(order, order + kept.count, 0);
  out.count = std::min(most, kept.count);
  std::partial_sort(order, order + out.count, order + kept.count, [&](int a, int b) {
    return perturbed[a] > perturbed[b] || (perturbed[a] == perturbed[b] && a < b);
  });
  double leads[kMostBest], shares[kMostBest];
  for (int i = 0; i < kMostBest; ++i) leads[i] = perturbed[i] - perturbed[order[0]];
  const double total = exp_all(leads, shares);
  for (int i = 0; i < out.count; ++i) {
    out.tokens[i] = best.tokens[order[i]];
    out.confidences[i] = is_drawn ? kept.probs[order[i]] : shares[order[i]] / total;
    out.draws[i] = perturbed[order[i]];
  }
  if (!is_drawn) return;
  out.num_proposed = kept.count;
  std::copy_n(best.tokens, kept.count, out.proposed_tokens);
  std::copy_n(kept.probs, kept.count, out.proposed_probs);
}

inline void candidates_row(const CandidatesCall& call, int64_t r) {
  DrawScratch& s = draw_scratch();
  const DrawRow& p = call.params[r];
  CandidatesRow& out = call.out[r];
  const int vocab = int(call.vocab);
  const float* x = processed(call.logits + r * vocab, vocab, p, call.seen, s);
  out.count = out.num_proposed = 0;
  float maxima[kGroups];
  const bool has_numbers = find_maxima(x, vocab, maxima);
  const float largest = *std::max_element(maxima, maxima + kGroups);
  if (!has_numbers || std::isinf(largest)) return;
  const bool is_greedy = p.temperature == 0.0;
  const int wanted = is_greedy ? int(call.most) : kMostBest;
  const BestTokens best = best_tokens(x, vocab, wanted, maxima, s);
  if (is_greedy) {
    write_likeliest(best, log_sum(x, vocab, largest), out);
  } else {
    write_race(best, p, call.lanes[r], int(call.most), out);
  }
}

}  // namespace PACELINE_ISA
}  // namespace paceline
