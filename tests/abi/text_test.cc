// text_test.cc - text that does not fit its field ends after a whole word and an ellipsis, and all text is valid UTF-8,
// whatever a name or a path holds. Python raises UnicodeDecodeError for anything else.
#include <clocale>
#include <cstddef>
#include <cstdlib>
#include <cwchar>

#include "abi/error.h"
#include "abi_fixture.h"

namespace tq::testing {
namespace {

const std::string kEllipsis = "\xe2\x80\xa6";

// The C library's decoder, not ours.
bool is_utf8(const std::string& text) {
  static const char* const locale = std::setlocale(LC_CTYPE, "C.UTF-8");
  EXPECT_NE(locale, nullptr);
  const char* from = text.c_str();
  std::mbstate_t state = {};
  return std::mbsrtowcs(nullptr, &from, 0, &state) != static_cast<size_t>(-1);
}

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

std::string repeated(const std::string& text, int times) {
  std::string out;
  for (int i = 0; i < times; ++i) out += text;
  return out;
}

std::string unknown_format(const std::string& name, size_t struct_size = sizeof(TqError)) {
  TqError error = make_error();
  std::memset(error.message, 'x', sizeof(error.message));
  error.struct_size = static_cast<uint32_t>(struct_size);
  TqFormatInfo info = {};
  info.struct_size = sizeof(info);
  EXPECT_EQ(api().format_by_name(name.c_str(), &info, &error), TQ_NOT_FOUND);
  const size_t room = struct_size - offsetof(TqError, message);
  const size_t length = strnlen(error.message, room);
  EXPECT_LT(length, room) << "no zero at the end";
  return {error.message, length};
}

// A message of every length: the cut falls on each byte of a character of 1, 2, 3 and 4 bytes.
TEST(Text, IsNeverCutWithinACharacter) {
  for (const char* character : {"x", "\xc3\xa9", "\xe2\x82\xac", "\xf0\x9f\x9a\x80"}) {
    for (int before = 0; before < 4; ++before) {
      const std::string name = std::string(before, '-') + repeated(character, 600);
      const std::string message = unknown_format(name);
      EXPECT_TRUE(is_utf8(message)) << message;
      EXPECT_TRUE(ends_with(message, character + kEllipsis)) << message;
    }
  }
}

// Every text of four words and spaces, in fields of every size.
TEST(Text, EndsAfterAWholeWord) {
  const std::string words[] = {"a", "caf\xc3\xa9", "\xce\xbb\xce\xad\xce\xbe\xce\xb7", "\xf0\x9f\x9a\x80"};
  for (int order = 0; order < 256; ++order) {
    std::string text;
    for (int i = 0; i < 4; ++i) text += (i > 0 ? " " : "") + words[order >> 2 * i & 3];
    const size_t first_word = text.find(' ');
    for (size_t size = 1; size <= text.size() + 2; ++size) {
      std::string field(size + 1, '#');
      copy_text(text, field.data(), size);
      ASSERT_EQ(field.back(), '#') << "wrote beyond a field of " << size;
      const std::string got = field.c_str();
      if (size > text.size()) {
        EXPECT_EQ(got, text);
        continue;
      }
      EXPECT_TRUE(is_utf8(got)) << got;
      if (size <= kEllipsis.size()) continue;  // no room for a sign that something is missing
      ASSERT_TRUE(ends_with(got, kEllipsis)) << got;
      const std::string kept = got.substr(0, got.size() - kEllipsis.size());
      EXPECT_EQ(text.compare(0, kept.size(), kept), 0) << got;
      if (size <= first_word + kEllipsis.size()) continue;  // not even one word has room
      EXPECT_EQ(text[kept.size()], ' ') << got << " of " << text;
      const size_t next_word = text.find(' ', kept.size() + 1);
      if (next_word == std::string::npos) continue;
      EXPECT_GT(next_word + kEllipsis.size(), size - 1) << "more would fit: " << got;
    }
  }
}

// An older or a frugal caller's struct is shorter; what fits is what it gets.
TEST(Text, FitsAStructOfAnySize) {
  const auto size_for = [](size_t message) { return offsetof(TqError, message) + message; };
  const std::string whole = unknown_format("caf\xc3\xa9 \xe2\x82\xac/x");
  for (size_t size = size_for(1); size <= sizeof(TqError); ++size) {
    const std::string message = unknown_format("caf\xc3\xa9 \xe2\x82\xac/x", size);
    EXPECT_TRUE(is_utf8(message)) << size << ": " << message;
    if (message != whole && size >= size_for(4)) {
      EXPECT_TRUE(ends_with(message, kEllipsis)) << size << ": " << message;
    }
  }
}

// File names are bytes on Linux. \xff begins no character, \xed\xa0\x80 is a surrogate, \xc0\x80 overlong.
TEST(Text, ReplacesBytesThatAreNoCharacter) {
  EXPECT_NE(unknown_format("a\xff"
                           "b\xed\xa0\x80"
                           "c\xc0\x80"
                           "d\xc3")
                .find("'a?b???c??d?'"),
            std::string::npos);
}

TEST(Text, OfARowOfLibrariesIsCutToo) {
  for (int before = 0; before < 2; ++before) {
    const std::string dir = std::string(before + 1, '/') + repeated("\xce\xbb\xce\xad\xce\xbe\xce\xb7/", 40) + "\xff";
    TqLibraryInfo rows[3] = {};
    for (TqLibraryInfo& row : rows) row.struct_size = sizeof(row);
    int64_t count = 3;
    ASSERT_EQ(api().list_libraries(dir.c_str(), rows, &count, nullptr), TQ_OK);
    for (const TqLibraryInfo& row : rows) {
      for (const std::string text : {row.path, row.reason}) {
        EXPECT_TRUE(is_utf8(text)) << text;
        EXPECT_TRUE(ends_with(text, "/" + kEllipsis)) << text;
      }
    }
  }
}

TEST(Text, OfAKernelLibraryThatCutItIsMended) {
  for (const char* shift : {"0", "1"}) {
    setenv("TQ_FAKE_SHIFT", shift, 1);
    TqBackendOptions options = {};
    options.struct_size = sizeof(options);
    options.device_kind = TQ_DEVICE_CUDA;
    options.kernels_dir = TQ_TEST_DIR "/long_reason";
    TqBackend* backend = nullptr;
    TqError error = make_error();
    EXPECT_EQ(api().create_backend(&options, &backend, &error), TQ_UNAVAILABLE);
    EXPECT_TRUE(is_utf8(error.message)) << error.message;
    EXPECT_TRUE(ends_with(error.message, " \xce\xbb\xce\xad\xce\xbe\xce\xb7" + kEllipsis)) << error.message;
  }
  unsetenv("TQ_FAKE_SHIFT");
}

}  // namespace
}  // namespace tq::testing
