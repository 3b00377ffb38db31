// thread_pool_test.cc - the CPU kernels' own threads where a process forks, and where it may have no more threads.
#include "kernels/cpu/thread_pool.h"

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <exception>
#include <thread>

#include "cpu_fixture.h"

namespace tq::testing {
namespace {

Config config() {
  Config c;
  c.format = find_format("turboquant_4bit_nc");
  c.dtype = Dtype::kF32;
  c.num_heads = 8;
  c.num_kv_heads = 2;
  c.head_dim = c.head_dim_v = 64;
  c.block_size = 64;
  c.query_lens = {4};
  c.seq_lens = {700};
  return c;
}

// Forks; the child runs f() and is killed if it is not done in 20 seconds. Returns what f() returned, or -1.
template <class F>
int in_a_child(F&& f) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    _exit(f());
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

// Attends with the parent's backend, then destroys it. 0: the answer was right.
int use_and_destroy(DeviceState* device) {
  const double error = run_and_compare(Case(config(), 3), device);
  cpu_kernels().destroy(device);
  return error <= 1e-3 ? 0 : 1;
}

class Fork : public ::testing::Test {
 protected:
  void SetUp() override { ASSERT_EQ(cpu_kernels().create(0, nullptr, &device_).code, 0); }
  void TearDown() override { cpu_kernels().destroy(device_); }
  DeviceState* device_ = nullptr;
};

TEST_F(Fork, AChildUsesItsParentsBackend) {
  EXPECT_LE(run_and_compare(Case(config(), 1), device_), 1e-3);
  EXPECT_EQ(in_a_child([this] { return use_and_destroy(device_); }), 0);
  EXPECT_LE(run_and_compare(Case(config(), 2), device_), 1e-3) << "and so does the parent, afterwards";
}

TEST_F(Fork, AChildDestroysWhatItNeverUsed) {
  EXPECT_LE(run_and_compare(Case(config(), 8), device_), 1e-3);
  EXPECT_EQ(in_a_child([this] { return cpu_kernels().destroy(device_), 0; }), 0);
}

TEST_F(Fork, AGrandchildToo) {
  EXPECT_EQ(in_a_child([this] {
              const bool right = run_and_compare(Case(config(), 4), device_) <= 1e-3;
              return right ? in_a_child([this] { return use_and_destroy(device_); }) : 1;
            }),
            0);
}

// Whatever the other thread holds at the moment of the fork stays held in the child.
TEST_F(Fork, WhileAnotherThreadAttends) {
  std::atomic<bool> stop{false};
  std::atomic<int> calls{0};
  std::thread busy([&] {
    Case test(config(), 5);
    while (!stop) {
      run_and_compare(test, device_);
      ++calls;
    }
  });
  for (int i = 0; i < 20; ++i) {
    for (const int before = calls; calls == before;) std::this_thread::yield();
    EXPECT_EQ(in_a_child([this] { return use_and_destroy(device_); }), 0) << "fork " << i;
  }
  stop = true;
  busy.join();
}

// Two threads of a child are the first to use the pool at once.
TEST_F(Fork, TwoThreadsOfAChild) {
  EXPECT_EQ(in_a_child([this] {
              std::atomic<int> wrong{0};
              auto one = [&](uint32_t seed) {
                wrong += run_and_compare(Case(config(), seed), device_) <= 1e-3 ? 0 : 1;
              };
              std::thread a(one, 6), b(one, 7);
              a.join(), b.join();
              return wrong.load();
            }),
            0);
}

// With room for a few stacks: an exception, and the threads that were started are gone again.
TEST(ThreadPool, TooManyThreadsAreAnException) {
  EXPECT_EQ(in_a_child([] {
              const rlimit limit = {size_t{256} << 20, size_t{256} << 20};
              setrlimit(RLIMIT_AS, &limit);
              try {
                ThreadPool pool(4096);
              } catch (const std::exception&) {
                return 7;
              }
              return 1;
            }),
            7);
}

}  // namespace
}  // namespace tq::testing
