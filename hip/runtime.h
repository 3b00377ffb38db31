// runtime.h - the functions of libamdhip64 that this library calls, found when they are first needed: the library links
// to nothing of ROCm and opens on any machine.
#pragma once

#include <cstddef>

namespace tq::hip {

// hipError_t is an int and 0 is success in every version. All of these exist unchanged in HIP 5, 6 and 7; structs and
// attribute numbers, which do change, are not used.
struct Runtime {
  int (*init)(unsigned flags);
  int (*device_count)(int* count);
  int (*get_device)(int* device);
  int (*set_device)(int device);
  int (*device_name)(char* name, int length, int device);
  int (*load_module)(void** module, const void* image);
  int (*unload_module)(void* module);
  int (*get_function)(void** function, void* module, const char* name);
  int (*get_global)(void** address, size_t* bytes, void* module, const char* name);
  int (*copy_to_host)(void* to, void* from, size_t bytes);
  int (*launch)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                unsigned block_z, unsigned shared_bytes, void* stream, void** arguments, void** extra);
  int (*synchronize_stream)(void* stream);
  int (*stream_is_capturing)(void* stream, int* status);
  int (*last_error)();
  const char* (*error_name)(int error);
  const char* (*error_string)(int error);
};

// null if libamdhip64 is not here or lacks a function; then *reason says so in one clause.
const Runtime* runtime(const char** reason);

// Whether TQ_HIP_LIBRARY names the library: then it is taken at its word, and no device files are looked at.
bool runtime_is_named();

}  // namespace tq::hip
