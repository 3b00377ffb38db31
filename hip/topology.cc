#include "hip/topology.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <sstream>

namespace tq::hip {

// gfx_target_version is major * 10000 + minor * 100 + stepping in decimal, and 0 for a CPU; a name has the last two as
// one hexadecimal digit each: 90010 is gfx90a.
static std::string target_name(long version) {
  std::ostringstream out;
  out << "gfx" << version / 10000 << std::hex << version / 100 % 100 << version % 100;
  return out.str();
}

std::vector<std::string> gpus_of(const std::string& root) {
  std::vector<std::string> out;
  std::error_code ignored;
  for (const auto& node : std::filesystem::directory_iterator(root + "/nodes", ignored)) {
    std::ifstream file(node.path() / "properties");
    std::string key;
    for (long value = 0; file >> key >> value;) {
      if (key == "gfx_target_version" && value != 0) out.push_back(target_name(value));
    }
  }
  std::sort(out.begin(), out.end());
  return out;
}

std::string missing_target(const std::vector<std::string>& gpus, const std::string& targets) {
  if (gpus.empty()) return "the amdgpu driver reports no GPU";
  std::istringstream list(targets);
  for (std::string target; list >> target;) {
    if (std::find(gpus.begin(), gpus.end(), target) != gpus.end()) return "";
  }
  std::string names;
  for (const std::string& gpu : gpus) {
    if (names.find(gpu) == std::string::npos) names += (names.empty() ? "" : ", ") + gpu;
  }
  return "this machine's GPU is " + names + ", and the kernels were compiled for " + targets;
}

}  // namespace tq::hip
