// runtime.cc - libamdhip64 of a GPU that is an instruction emulator in Python (emulator.py): a kernel library opens it
// by TQ_HIP_LIBRARY and its compiled code objects run, one instruction after the other. Device memory is host memory.
// Built by run.sh; not part of CI, which has no emulator.
#include <Python.h>
#include <dlfcn.h>

#include <cstdlib>
#include <cstring>

#include "simt/host_memory.h"

namespace {

constexpr int kNotInitialized = 3, kNotFound = 500, kLaunchFailure = 719;
PyObject* emulator;

// Calls a function of emulator.py; null, with the traceback printed, if it raised.
PyObject* call(const char* name, const char* format, ...) {
  va_list values;
  va_start(values, format);
  PyObject* arguments = Py_VaBuildValue(format, values);
  va_end(values);
  PyObject* function = PyObject_GetAttrString(emulator, name);
  PyObject* result = function != nullptr ? PyObject_CallObject(function, arguments) : nullptr;
  if (result == nullptr) PyErr_Print();
  Py_XDECREF(function);
  Py_XDECREF(arguments);
  return result;
}

}  // namespace

TQ_HIP_API int hipInit(unsigned) {
  if (emulator != nullptr) return 0;
  // Python's own modules look for its symbols among the global ones, and this library was opened as a local one.
  Dl_info python;
  if (dladdr(reinterpret_cast<const void*>(&Py_InitializeEx), &python) != 0)
    dlopen(python.dli_fname, RTLD_NOW | RTLD_GLOBAL);
  Py_InitializeEx(0);  // finds emulator.py by PYTHONPATH
  emulator = PyImport_ImportModule("emulator");
  if (emulator == nullptr) PyErr_Print();
  return emulator != nullptr ? 0 : kNotInitialized;
}
TQ_HIP_API int hipGetDeviceCount(int* count) {
  *count = 1;
  return 0;
}
TQ_HIP_API int hipGetDevice(int* device) {
  *device = 0;
  return 0;
}
TQ_HIP_API int hipSetDevice(int) { return 0; }
TQ_HIP_API int hipDeviceGetName(char* name, int length, int) {
  const char* target = std::getenv("TQ_EMULATOR_TARGET");
  std::strncpy(name, target != nullptr ? target : "", static_cast<size_t>(length));
  return 0;
}
TQ_HIP_API int hipModuleLoadData(void** module, const void*) {
  *module = &emulator;
  return hipInit(0);
}
TQ_HIP_API int hipModuleUnload(void*) { return 0; }
TQ_HIP_API int hipModuleGetFunction(void** function, void*, const char* name) {
  PyObject* handle = call("function", "(s)", name);
  *function = handle != nullptr ? PyLong_AsVoidPtr(handle) : nullptr;
  return *function != nullptr ? 0 : kNotFound;
}
TQ_HIP_API int hipModuleGetGlobal(void** address, size_t* bytes, void*, const char* name) {
  PyObject* found = call("address_of", "(s)", name);
  *address = found != nullptr ? PyLong_AsVoidPtr(found) : nullptr;
  *bytes = sizeof(int);
  return *address != nullptr ? 0 : kNotFound;
}
TQ_HIP_API int hipModuleLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned threads, unsigned,
                                     unsigned, unsigned, void*, void** arguments, void**) {
  const auto handle = reinterpret_cast<unsigned long long>(function);
  const auto first = reinterpret_cast<unsigned long long>(arguments[0]);
  return call("launch", "(KIIIIK)", handle, gx, gy, gz, threads, first) != nullptr ? 0 : kLaunchFailure;
}
TQ_HIP_API const char* hipGetErrorName(int) { return "hipErrorLaunchFailure"; }
TQ_HIP_API const char* hipGetErrorString(int) { return "the emulator raised"; }
