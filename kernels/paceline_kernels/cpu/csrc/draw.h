// What calls that draw are given and where they write: one for the tokens of a step, one for the
// candidates of a draft, one for the distributions that tokens were drawn from.
//
// Shape legend: R rows, V vocabulary, K wanted log-probabilities or named tokens, P places.
#pragma once

#include <cstdint>

namespace paceline {

// How a row is drawn. All fields have 8 bytes: paceline_kernels/cpu/sampling.py packs the same.
struct DrawRow {
  double temperature;         // 0: the best token
  double top_p;               // 1: off
  double min_p;               // 0: off
  double repetition_penalty;  // 1: off
  double presence_penalty;
  double frequency_penalty;
  uint64_t seed;
  int64_t stream;
  int64_t position;
  int64_t top_k;              // 0: off
  int64_t num_logprobs;
  // What penalties count: tokens [tokens_begin, + num_prompt) of the prompt, num_output behind.
  int64_t tokens_begin;
  int64_t num_prompt;
  int64_t num_output;
};

struct DrawCall {
  const float* logits;        // [R, V]
  int64_t rows;
  int64_t vocab;
  const DrawRow* params;      // [R]
  const int64_t* seen;        // tokens of all rows' prompts and outputs
  int64_t most_logprobs;      // K
  int64_t* tokens;            // [R], -1: the row has no distribution
  float* logprobs;            // [R], written where num_logprobs > 0
  int64_t* best_tokens;       // [R, K], as many as the row wants
  float* best_logprobs;       // [R, K]
};

// Tokens of a row that a draft chooses from: what comes after them is next to never accepted.
constexpr int kMostBest = 64;

// What is proposed behind one node. Fields as in paceline_kernels/cpu/library.py.
struct CandidatesRow {
  int64_t count;                  // 0: the row has no distribution
  int64_t num_proposed;           // 0: guesses of what the target draws
  int64_t tokens[kMostBest];      // in order of trial
  double confidences[kMostBest];
  // Of rows that draw: perturbed log-probabilities of the tokens, and what they were drawn from.
  double draws[kMostBest];
  int64_t proposed_tokens[kMostBest];
  double proposed_probs[kMostBest];
};

struct CandidatesCall {
  const float* logits;        // [R, V]
  int64_t rows;
  int64_t vocab;
  const DrawRow* params;      // [R]
  const int64_t* seen;        // as in DrawCall
  const int64_t* lanes;       // [R] noise of a row's own draws; negative: it guesses the target's
  int64_t most;               // candidates of a row, 1 to kMostBest
  CandidatesRow* out;         // [R]
};

struct LikeliestCall {
  const float* logits;        // [R, V]
  int64_t vocab;
  const int64_t* places;      // [P] rows
  int64_t top;                // K, 1 to V
  int32_t* ids;               // [P, K] best first, of equal ones the lower tokens first
  _Float16* probs;            // [P, K]
  _Float16* tails;            // [P] mass of all others
};

}  // namespace paceline
