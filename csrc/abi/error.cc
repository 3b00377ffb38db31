#include "abi/error.h"

#include <algorithm>
#include <cstddef>
#include <cstring>

namespace tq {

int32_t report(const Status& status, TqError* error) noexcept {
  if (error == nullptr || error->struct_size < offsetof(TqError, message) + 1) return status.code;
  error->code = status.code;
  const size_t room = std::min<size_t>(error->struct_size, sizeof(TqError)) - offsetof(TqError, message);
  const size_t length = std::min(status.message.size(), room - 1);
  std::memcpy(error->message, status.message.data(), length);
  error->message[length] = '\0';
  return status.code;
}

}  // namespace tq
