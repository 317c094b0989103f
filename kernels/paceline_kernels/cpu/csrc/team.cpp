#include "team.h"

#include <chrono>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace paceline {
namespace {

// Phases take 1 to 100 microseconds, and the engine's work between two steps about as long.
constexpr auto kSpin = std::chrono::microseconds(100);

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

void wait_while(const std::atomic<int>& value, int old) {
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 64; ++i) {
      if (value.load(std::memory_order_acquire) != old) return;
      relax();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

}  // namespace

Team::Team(int size) : size_(size) {
  for (int thread = 1; thread < size; ++thread) {
    threads_.emplace_back([this, thread] { serve(thread); });
  }
}

Team::~Team() {
  is_stopping_ = true;
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  for (auto& thread : threads_) thread.join();
}

void Team::run(void (*body)(void*, int), void* context) {
  const std::lock_guard lock(running_);
  body_ = body;
  context_ = context;
  task_.store(0, std::memory_order_relaxed);
  if (size_ > 1) {
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
  }
  body(context, 0);
  barrier();
}

void Team::barrier() {
  if (size_ == 1) {
    task_.store(0, std::memory_order_relaxed);
    return;
  }
  const int generation = generation_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
    arrived_.store(0, std::memory_order_relaxed);
    task_.store(0, std::memory_order_relaxed);
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
  } else {
    wait_while(generation_, generation);
  }
}

void Team::serve(int thread) {
  for (int epoch = 0;; ++epoch) {
    wait_while(epoch_, epoch);
    if (is_stopping_) return;
    body_(context_, thread);
    barrier();
  }
}

}  // namespace paceline
