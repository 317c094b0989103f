// A team of threads that runs one function together, with barriers inside it.
//
// A decode step is some hundred small phases; waking threads for each would cost more than the
// phases. So a step is one `run`: every thread walks through the same phases, takes tasks of a
// phase by `next_task`, and meets the others at `barrier`. Waiting spins for the time a phase
// usually takes and sleeps in the kernel after that, so that a team whose core is taken by
// another process does not burn the other one.
#pragma once

#include <atomic>
#include <mutex>
#include <thread>
#include <vector>

namespace paceline {

class Team {
 public:
  explicit Team(int size);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }

  // Calls body(context, thread) on every thread; the caller is thread 0. One call at a time:
  // others wait.
  void run(void (*body)(void* context, int thread), void* context);

  template <typename Body>
  void run(Body&& body) {
    run([](void* context, int thread) { (*static_cast<Body*>(context))(thread); }, &body);
  }

  // Waits until all threads are here. Tasks are counted from 0 again behind it.
  void barrier();

  // Hands out 0, 1, 2, ... once each between two barriers.
  int next_task() { return task_.fetch_add(1, std::memory_order_relaxed); }

 private:
  void serve(int thread);

  const int size_;
  std::mutex running_;
  void (*body_)(void*, int) = nullptr;
  void* context_ = nullptr;
  alignas(64) std::atomic<int> epoch_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> generation_{0};
  alignas(64) std::atomic<int> task_{0};
  std::atomic<bool> is_stopping_{false};
  std::vector<std::thread> threads_;
};

}  // namespace paceline
