// error.h - one way to fail: a Status inside the library, a TqError at its boundary. Also how text gets into a field.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <utility>

#include "kernels/kernels.h"
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

// Copies text into to[size], zero-terminated and always valid UTF-8: callers decode it, and Python refuses half a
// character. What is too long ends after a whole word (words end at a space, and at a slash, so that a path keeps its
// first folders) and an ellipsis; only a word of more than 64 bytes is cut itself. A byte that belongs to no character,
// which a path may hold, becomes '?'. was_cut: the text has lost its end before.
void copy_text(std::string_view text, char* to, size_t size, bool was_cut = false) noexcept;

template <size_t N>
void copy_text(std::string_view text, char (&to)[N]) noexcept {
  copy_text(text, to, N);
}

// Copies status into the caller's *error (may be null; its struct_size bounds what is written) and returns the code.
int32_t report(const Status& status, TqError* error) noexcept;

// Kernel libraries write their sentence with snprintf, so one that fills its field has lost its end.
Status from_kernel(const KernelStatus& status);

}  // namespace tq
