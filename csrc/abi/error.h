// error.h - one way to fail: a Status inside the library, a TqError at its boundary.
#pragma once

#include <string>
#include <utility>

#include "tq_backend.h"

namespace tq {

struct Status {
  int32_t code = TQ_OK;
  std::string message;

  bool ok() const { return code == TQ_OK; }
};

#define TQ_RETURN_IF_ERROR(expr)                                      \
  do {                                                                \
    if (::tq::Status status_ = (expr); !status_.ok()) return status_; \
  } while (0)

inline Status invalid(std::string message) { return {TQ_INVALID_ARGUMENT, std::move(message)}; }

// Copies status into the caller's *error (may be null; its struct_size bounds what is written) and returns the code.
int32_t report(const Status& status, TqError* error) noexcept;

}  // namespace tq
