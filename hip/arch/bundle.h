// bundle.h - the compiled kernels for all targets, inside this library, as hipModuleLoadData takes them.
#pragma once

namespace tq::hip {

const void* bundle();
inline constexpr const char* kBundleTargets = TQ_HIP_TARGETS;  // "gfx90a gfx942 ..."

}  // namespace tq::hip
