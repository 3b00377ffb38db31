#include "simt/simt.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#if defined(__x86_64__)
// Saves what a call preserves, and continues on another stack.
extern "C" void tq_simt_switch(void** from, void* to);
asm(R"(
.text
.globl tq_simt_switch
.hidden tq_simt_switch
.type tq_simt_switch, @function
tq_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size tq_simt_switch, .-tq_simt_switch
)");
#else
#include <ucontext.h>
#endif

namespace simt {
namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kSharedBytes = 64 << 10;
constexpr size_t kSlotBytes = 64;
constexpr int kMaxWave = 64;

enum class State { kReady, kExchange, kBarrier, kDone };

struct Fiber {
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStackBytes]};
#if defined(__x86_64__)
  void* top = nullptr;
#else
  ucontext_t context;
#endif
  State state = State::kDone;
  const char* what = nullptr;  // that it waits for
  Index index = {};
};

struct Wave {
  alignas(64) unsigned char slots[2][kMaxWave][kSlotBytes];
  int parity = 0;
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Wave> waves;
  int wave_size = 64;
  int current = 0;
  Index block = {}, block_size = {}, grid = {};
  void (*kernel)(const void*) = nullptr;
  const void* arguments = nullptr;
  alignas(128) unsigned char shared[kSharedBytes];
  std::mt19937 rng{1};
#if defined(__x86_64__)
  void* scheduler = nullptr;
#else
  ucontext_t scheduler;
#endif
};

Machine& machine() {
  static auto* m = new Machine;
  return *m;
}

[[noreturn]] void fail(const char* sentence, const char* detail) {
  std::fprintf(stderr, "simt: %s: %s (block %u %u %u)\n", sentence, detail, machine().block.x, machine().block.y,
               machine().block.z);
  std::abort();
}

Fiber& self() { return machine().fibers[machine().current]; }

void leave() {  // back to the scheduler
#if defined(__x86_64__)
  tq_simt_switch(&self().top, machine().scheduler);
#else
  swapcontext(&self().context, &machine().scheduler);
#endif
}

void run_fiber() {
  machine().kernel(machine().arguments);
  self().state = State::kDone;
  leave();
}

void enter(int i) {
  Machine& m = machine();
  m.current = i;
#if defined(__x86_64__)
  tq_simt_switch(&m.scheduler, m.fibers[i].top);
#else
  swapcontext(&m.scheduler, &m.fibers[i].context);
#endif
}

void prepare(Fiber& f) {
  f.state = State::kReady;
#if defined(__x86_64__)
  // What tq_simt_switch pops: six registers and the address to return to, where the stack is as after a call.
  auto** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(f.stack.get() + kStackBytes) / 16 * 16);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&run_fiber);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  f.top = top;
#else
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack.get();
  f.context.uc_stack.ss_size = kStackBytes;
  f.context.uc_link = nullptr;
  makecontext(&f.context, &run_fiber, 0);
#endif
}

// Lets a wave's lanes go on if all of them have met at one operation.
bool release_wave(int w) {
  Machine& m = machine();
  int waiting = 0;
  const char* what = nullptr;
  for (int i = 0; i < m.wave_size; ++i) {
    const Fiber& f = m.fibers[w * m.wave_size + i];
    if (f.state != State::kExchange) continue;
    ++waiting;
    if (what != nullptr && std::strcmp(what, f.what) != 0) fail("lanes of a wave meet at different operations", what);
    what = f.what;
  }
  if (waiting == 0) return false;
  if (waiting < m.wave_size) fail("not all lanes of a wave reach an operation", what);
  for (int i = 0; i < m.wave_size; ++i) m.fibers[w * m.wave_size + i].state = State::kReady;
  m.waves[w].parity ^= 1;
  return true;
}

void run_block(int threads) {
  Machine& m = machine();
  std::memset(m.shared, 0xff, sizeof(m.shared));
  for (int i = 0; i < threads; ++i) {
    prepare(m.fibers[i]);
    m.fibers[i].index = {static_cast<unsigned>(i), 0, 0};
  }
  const int num_waves = threads / m.wave_size;
  for (Wave& w : m.waves) std::memset(w.slots, 0xff, sizeof(w.slots));
  std::vector<int> lanes(m.wave_size), waves(num_waves);
  std::iota(lanes.begin(), lanes.end(), 0);
  std::iota(waves.begin(), waves.end(), 0);
  std::shuffle(lanes.begin(), lanes.end(), m.rng);
  for (;;) {
    std::shuffle(waves.begin(), waves.end(), m.rng);
    for (const int w : waves) {  // as far as it comes without the others
      do {
        for (const int i : lanes) {
          if (m.fibers[w * m.wave_size + i].state == State::kReady) enter(w * m.wave_size + i);
        }
      } while (release_wave(w));
    }
    int barrier = 0, done = 0;
    for (int i = 0; i < threads; ++i) {
      barrier += m.fibers[i].state == State::kBarrier ? 1 : 0;
      done += m.fibers[i].state == State::kDone ? 1 : 0;
    }
    if (done == threads) return;
    if (barrier + done < threads) fail("a block is stuck", "internal error");
    for (int w = 0; w < num_waves; ++w) {  // a whole wave may have ended
      for (int i = 1; i < m.wave_size; ++i) {
        if (m.fibers[w * m.wave_size + i].state != m.fibers[w * m.wave_size].state) {
          fail("not all lanes of a wave reach an operation", "block barrier");
        }
      }
    }
    for (int i = 0; i < threads; ++i) {
      if (m.fibers[i].state == State::kBarrier) m.fibers[i].state = State::kReady;
    }
  }
}

}  // namespace

const Index& thread_index() { return self().index; }
const Index& block_index() { return machine().block; }
const Index& block_dim() { return machine().block_size; }
const Index& grid_dim() { return machine().grid; }
int lane() { return machine().current % machine().wave_size; }

void* shared_memory(size_t bytes) {
  if (bytes > kSharedBytes) fail("a block asks for more than 64 KB of shared memory", "shared_memory");
  return machine().shared;
}

void block_barrier() {
  self().state = State::kBarrier;
  leave();
}

Exchange::Exchange(const char* what, const void* mine, size_t bytes) {
  Machine& m = machine();
  if (bytes > kSlotBytes) fail("a lane gives more than a slot holds", what);
  Wave& wave = m.waves[m.current / m.wave_size];
  parity_ = wave.parity;
  std::memcpy(wave.slots[parity_][lane()], mine, bytes);
  self().state = State::kExchange;
  self().what = what;
  leave();
}

const void* Exchange::slot(int lane) const {
  return machine().waves[machine().current / machine().wave_size].slots[parity_][lane % machine().wave_size];
}

void launch(void (*kernel)(const void*), const void* arguments, Index grid, Index block, int wave) {
  Machine& m = machine();
  const int threads = static_cast<int>(block.x);
  if (threads % wave != 0 || block.y != 1 || block.z != 1 || wave > kMaxWave) {
    fail("a block must be whole waves in one row", "launch");
  }
  if (m.fibers.size() < static_cast<size_t>(threads)) m.fibers.resize(threads);
  m.waves.resize(threads / wave);
  m.kernel = kernel, m.arguments = arguments, m.wave_size = wave, m.grid = grid, m.block_size = block;
  for (m.block.z = 0; m.block.z < grid.z; ++m.block.z) {
    for (m.block.y = 0; m.block.y < grid.y; ++m.block.y) {
      for (m.block.x = 0; m.block.x < grid.x; ++m.block.x) run_block(threads);
    }
  }
}

void set_seed(uint32_t seed) { machine().rng.seed(seed); }

}  // namespace simt
