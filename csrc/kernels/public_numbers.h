// public_numbers.h - the numbers of the public header that kernel libraries use, which do not include it.
// csrc/abi/public_numbers.cc asserts that the two are equal.
#pragma once

namespace tq {

// TqCode.
enum StatusCode : int {  // NOLINT(performance-enum-size): KernelStatus.code is an int
  kOk = 0,
  kInvalidArgument = 3,
  kResourceExhausted = 8,
  kUnimplemented = 12,
  kInternal = 13,
  kUnavailable = 14,
};

// TqDeviceKind.
// NOLINTNEXTLINE(performance-enum-size): KernelApi.device_kind is an int
enum DeviceKind : int { kCpuDevice = 1, kCudaDevice = 2, kHipDevice = 3 };

}  // namespace tq
