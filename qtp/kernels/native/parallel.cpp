#include "parallel.hpp"

#include <dlfcn.h>

namespace qtp {
namespace {

// libgomp's own entry points, which LLVM's and Intel's runtimes offer as well.
struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
  void (*barrier)();
  int (*thread)();
  int (*threads)();
  int (*most)();
};

template <class F>
bool find(F*& into, const char* name) {
  into = reinterpret_cast<F*>(dlsym(RTLD_DEFAULT, name));
  return into != nullptr;
}

const OpenMP* openmp() {
  static OpenMP found;
  static const bool there = find(found.parallel, "GOMP_parallel") && find(found.barrier, "GOMP_barrier") &&
                            find(found.thread, "omp_get_thread_num") && find(found.threads, "omp_get_num_threads") &&
                            find(found.most, "omp_get_max_threads");
  return there ? &found : nullptr;
}

struct Job {
  void (*work)(void*, int, int);
  void* data;
};

void run(void* job_) {
  const Job& job = *static_cast<Job*>(job_);
  job.work(job.data, openmp()->thread(), openmp()->threads());
}

}  // namespace

int threads() { return openmp() != nullptr ? openmp()->most() : 1; }

void fork(int threads, void (*work)(void*, int, int), void* data) {
  if (openmp() == nullptr || threads <= 1) {
    work(data, 0, 1);
    return;
  }
  Job job{work, data};
  openmp()->parallel(run, &job, unsigned(threads), 0);
}

void meet() {
  if (openmp() != nullptr) openmp()->barrier();
}

}  // namespace qtp
