#include "parallel.h"

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#define FASTPEFT_DLSYM 1
#endif

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

namespace fastpeft {
namespace {

struct Job {
  void (*body)(void*, int);
  void* context;
  int parts;
  std::atomic<int> next{0};
};

// parts are handed out one by one, so a team of any size (one thread inside another parallel region) does all of them
void work(void* pointer) {
  Job& job = *static_cast<Job*>(pointer);
  for (int k = job.next++; k < job.parts; k = job.next++) job.body(job.context, k);
}

using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

GompParallel gomp_parallel() {
#ifdef FASTPEFT_DLSYM
  static const auto found = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
#else
  return nullptr;
#endif
}

}  // namespace

void parallel(int parts, void (*body)(void*, int), void* context) {
  Job job{body, context, parts};
  if (parts > 1 && gomp_parallel() != nullptr) {
    gomp_parallel()(work, &job, static_cast<unsigned>(parts), 0);
    return;
  }
  std::vector<std::thread> pool;
  try {
    for (int k = 1; k < parts; ++k) pool.emplace_back(work, &job);
  } catch (const std::system_error&) {  // no more threads to be had: those that exist, and this one, do the rest
  }
  work(&job);
  for (std::thread& t : pool) t.join();
}

}  // namespace fastpeft
