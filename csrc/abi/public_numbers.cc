// public_numbers.cc - numbers that the private headers share with the public one, which they must not include: equal,
// or this does not compile.
#include "codec/format.h"
#include "kernels/kernels.h"
#include "kernels/public_numbers.h"
#include "planner/planner.h"
#include "tq_backend.h"

namespace tq {

static_assert(uint32_t{kTurboquantK8V4} == TQ_FORMAT_TURBOQUANT_K8V4);
static_assert(uint32_t{kTurboquant4BitNc} == TQ_FORMAT_TURBOQUANT_4BIT_NC);
static_assert(uint32_t{kTurboquantK3V4Nc} == TQ_FORMAT_TURBOQUANT_K3V4_NC);
static_assert(uint32_t{kTurboquant3BitNc} == TQ_FORMAT_TURBOQUANT_3BIT_NC);
static_assert(uint32_t{kTq8} == TQ_FORMAT_TQ_8);
static_assert(uint32_t{kTqK5V4} == TQ_FORMAT_TQ_K5V4);
static_assert(uint32_t{kTq4} == TQ_FORMAT_TQ_4);
static_assert(uint32_t{kRawF32} == TQ_FORMAT_RAW_F32);

static_assert(int{kOk} == TQ_OK);
static_assert(int{kInvalidArgument} == TQ_INVALID_ARGUMENT);
static_assert(int{kResourceExhausted} == TQ_RESOURCE_EXHAUSTED);
static_assert(int{kUnimplemented} == TQ_UNIMPLEMENTED);
static_assert(int{kInternal} == TQ_INTERNAL);
static_assert(int{kUnavailable} == TQ_UNAVAILABLE);

static_assert(int{kCpuDevice} == TQ_DEVICE_CPU);
static_assert(int{kCudaDevice} == TQ_DEVICE_CUDA);
static_assert(int{kHipDevice} == TQ_DEVICE_HIP);

static_assert(int{static_cast<uint8_t>(Dtype::kF32)} == TQ_DTYPE_F32);
static_assert(int{static_cast<uint8_t>(Dtype::kF16)} == TQ_DTYPE_F16);
static_assert(int{static_cast<uint8_t>(Dtype::kBF16)} == TQ_DTYPE_BF16);

static_assert(int{static_cast<uint8_t>(Strategy::kUniform)} == TQ_PLAN_UNIFORM);
static_assert(int{static_cast<uint8_t>(Strategy::kSideBySide)} == TQ_PLAN_SIDE_BY_SIDE);
static_assert(int{static_cast<uint8_t>(Strategy::kEqualPages)} == TQ_PLAN_EQUAL_PAGES);
static_assert(int{static_cast<uint8_t>(Strategy::kPaddedPages)} == TQ_PLAN_PADDED_PAGES);

}  // namespace tq
