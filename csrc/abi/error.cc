#include "abi/error.h"

#include <algorithm>
#include <cstddef>
#include <cstring>

namespace tq {
namespace {

constexpr std::string_view kEllipsis = "\xe2\x80\xa6";

// What is longer is a name that somebody made up, and the reader is better off with its beginning than without it.
constexpr size_t kLongestWord = 64;

// Bytes of the UTF-8 character at the start of text, or 0 if there is none (Unicode 15, table 3-7).
size_t character_bytes(std::string_view text) {
  const auto byte = [text](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned first = byte(0);
  if (first < 0x80) return 1;
  const size_t size = first >= 0xc2 && first < 0xe0   ? 2
                      : first >= 0xe0 && first < 0xf0 ? 3
                      : first >= 0xf0 && first < 0xf5 ? 4
                                                      : 0;
  if (size == 0 || text.size() < size) return 0;
  // The second byte is narrower after these: no overlong form, no surrogate, nothing beyond U+10FFFF.
  const unsigned low = first == 0xe0 ? 0xa0 : first == 0xf0 ? 0x90 : 0x80;
  const unsigned high = first == 0xed ? 0x9f : first == 0xf4 ? 0x8f : 0xbf;
  if (byte(1) < low || byte(1) > high) return 0;
  for (size_t i = 2; i < size; ++i) {
    if (byte(i) < 0x80 || byte(i) > 0xbf) return 0;
  }
  return size;
}

}  // namespace

void copy_text(std::string_view text, char* to, size_t size, bool was_cut) noexcept {
  if (size == 0) return;
  const size_t room = size - 1;
  const size_t room_if_cut = room - std::min(room, kEllipsis.size());
  size_t length = 0;            // of what is in to
  size_t whole_words = 0;       // the part of it that ends with a word and leaves room for an ellipsis
  size_t whole_characters = 0;  // likewise with a character
  while (!text.empty()) {
    const size_t bytes = character_bytes(text);
    const size_t step = std::max<size_t>(bytes, 1);
    if (length + step > room) break;
    if (bytes == 0) {
      to[length] = '?';
    } else {
      std::memcpy(to + length, text.data(), bytes);
    }
    length += step;
    text.remove_prefix(step);
    if (length > room_if_cut) continue;
    whole_characters = length;
    const bool at_the_end = text.empty() ? !was_cut : text.front() == ' ';
    if (at_the_end || to[length - 1] == '/') whole_words = length;
  }
  if (!text.empty() || was_cut) {
    length = whole_characters - whole_words < kLongestWord ? whole_words : whole_characters;
    if (room >= kEllipsis.size()) {
      std::memcpy(to + length, kEllipsis.data(), kEllipsis.size());
      length += kEllipsis.size();
    }
  }
  to[length] = '\0';
}

int32_t report(const Status& status, TqError* error) noexcept {
  if (error == nullptr || error->struct_size < offsetof(TqError, message) + 1) return status.code;
  error->code = status.code;
  const size_t room = std::min<size_t>(error->struct_size, sizeof(TqError)) - offsetof(TqError, message);
  copy_text(status.message, error->message, room);
  return status.code;
}

Status from_kernel(const KernelStatus& status) {
  if (status.code == TQ_OK) return {};
  constexpr size_t kSize = sizeof(status.message);
  const size_t length = strnlen(status.message, kSize);
  char message[kSize];
  copy_text({status.message, length}, message, kSize, length + 1 >= kSize);
  return {status.code, message};
}

}  // namespace tq
