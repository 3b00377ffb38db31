// library_1_1.cc - the library as it will be when its header has grown: today's sources, compiled with the header of
// next_header.cmake, and the function that this header appends.
#define tq_get_api tq_get_api_without_the_function
#include "abi/api.cc"
#undef tq_get_api

extern "C" __attribute__((visibility("default"))) const TqApi* tq_get_api(uint32_t major, TqError* error) {
  static const TqApi grown = [] {
    TqApi api = *tq_get_api_without_the_function(TQ_ABI_MAJOR, nullptr);
    api.appended = [](int64_t x) { return x + 1; };
    return api;
  }();
  return major == TQ_ABI_MAJOR ? &grown : tq_get_api_without_the_function(major, error);
}
