/* where_main.c - an engine that changes its working directory before it makes a backend: prints the kernel library that
 * it got, or why it got none. */
#include <stdio.h>
#include <unistd.h>

#include "tq_backend.h"

int main(int argc, char** argv) {
  if (argc != 2 || chdir(argv[1]) != 0) return 2;
  TqError error = {.struct_size = sizeof(error)};
  TqBackendOptions options = {.struct_size = sizeof(options), .device_kind = TQ_DEVICE_CPU};
  TqCaps caps = {.struct_size = sizeof(caps)};
  TqBackend* backend = NULL;
  const TqApi* api = tq_get_api(TQ_ABI_MAJOR, &error);
  if (api == NULL || api->create_backend(&options, &backend, &error) != TQ_OK ||
      api->query_caps(backend, &caps, &error) != TQ_OK) {
    puts(error.message);
    return 1;
  }
  puts(caps.library);
  api->destroy_backend(backend);
  return 0;
}
