// ptx.cuh - the single instructions that C++ has no word for: byte permute, exponent, copies into shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace tq::cuda {

#define TQ_DEVICE __device__ __forceinline__

constexpr unsigned kFullMask = 0xffffffffu;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define TQ_HAS_BULK_COPY 1
#else
#define TQ_HAS_BULK_COPY 0
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define TQ_HAS_ASYNC_COPY 1
#else
#define TQ_HAS_ASYNC_COPY 0
#endif

// Byte i of the result is byte (selector nibble i & 7) of {b, a}; a nibble with its top bit set gives that byte's sign.
TQ_DEVICE uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
  return r;
}

// (a | b) ^ ~c; the compiler would take two instructions.
TQ_DEVICE uint32_t join_and_flip(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0xA9;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}

TQ_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

TQ_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Within 2^-23 of the root; sqrtf costs a branch and a dozen instructions more.
TQ_DEVICE float sqrt_approx(float x) {
  float y;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A grid that was launched to follow another one early (programmatic dependent launch): waits until that one is done
// and what it wrote is visible; lets the one after it begin to launch. Both do nothing in a launch of the ordinary
// kind.
TQ_DEVICE void wait_for_previous_grid() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
TQ_DEVICE void let_next_grid_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Counts in a counter that begins at zero; true for the last of `count`, which sets it back to zero. A release and an
// acquire for the whole device.
TQ_DEVICE bool arrive(uint32_t* counter, int count) {
  uint32_t before;
  const uint32_t last = static_cast<uint32_t>(count) - 1;
  asm volatile("atom.inc.acq_rel.gpu.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(last) : "memory");
  return before == last;
}

// x in a register that the compiler takes for the result of something expensive: it keeps it there instead of computing
// it anew at every use.
TQ_DEVICE uint32_t opaque(uint32_t x) {
  asm("" : "+r"(x));
  return x;
}
// Keeps the load of x, whose value nobody needs.
TQ_DEVICE void touch(uint32_t x) { asm volatile("" ::"r"(x)); }
TQ_DEVICE float opaque_float(float x) {
  asm("" : "+f"(x));
  return x;
}

TQ_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
TQ_DEVICE const uint8_t* shared_pointer(uint32_t address) {
  return static_cast<const uint8_t*>(__cvta_shared_to_generic(address));
}

// One slot of a ring in shared memory that one warp fills and reads by itself.
//   Hopper: one bulk copy and one transaction barrier; Ampere: 16-byte asynchronous copies; before: plain copies.
#if TQ_HAS_BULK_COPY
// Barriers and targets are addresses in shared memory.
TQ_DEVICE void ring_init(uint32_t barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}
TQ_DEVICE void ring_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
TQ_DEVICE void ring_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Called by one lane.
TQ_DEVICE void ring_copy(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}
TQ_DEVICE void ring_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\nWAIT_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra DONE_%=;\nbra WAIT_%=;\nDONE_%=:\n}" ::"r"(
          barrier),
      "r"(parity)
      : "memory");
}
#endif

// 16 bytes, global to shared, by this thread; complete after async_copy_wait<0>() and a barrier.
TQ_DEVICE void async_copy_16(uint32_t to, const void* from) {
#if TQ_HAS_ASYNC_COPY
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
#else
  *static_cast<uint4*>(__cvta_shared_to_generic(to)) = *static_cast<const uint4*>(from);
#endif
}
TQ_DEVICE void async_copy_commit() {
#if TQ_HAS_ASYNC_COPY
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int kPending>
TQ_DEVICE void async_copy_wait() {
#if TQ_HAS_ASYNC_COPY
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace tq::cuda
