// topology.h - which AMD GPUs a machine has, without starting ROCm: from the kernel driver's files.
#pragma once

#include <string>
#include <vector>

namespace tq::hip {

// Names of the GPUs' instruction sets ("gfx942"), from <root>/nodes/*/properties; root is normally
// /sys/class/kfd/kfd/topology.
std::vector<std::string> gpus_of(const std::string& root);

// Empty if one of the GPUs is among the targets ("gfx90a gfx942"), else a clause that says what is there instead.
std::string missing_target(const std::vector<std::string>& gpus, const std::string& targets);

}  // namespace tq::hip
