// build_note.h - the ELF note by which a kernel library's file tells its build id. Comparing it needs no dlopen, which
// would run the constructors of a library that is not ours.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tq {

constexpr char kBuildNoteName[] = "tq-backend";
constexpr uint32_t kBuildNoteType = 1;

// As it lies in the file: a note's header, then its name and its text, both padded to 4 bytes.
struct BuildNote {
  uint32_t name_bytes;
  uint32_t text_bytes;
  uint32_t type;
  char name[12];
  char build_id[64];  // zeros behind it
};
static_assert(sizeof(kBuildNoteName) <= sizeof(BuildNote::name));

template <size_t N>
constexpr BuildNote make_build_note(const char (&build_id)[N]) {
  static_assert(N <= sizeof(BuildNote::build_id));
  BuildNote note = {sizeof(kBuildNoteName), sizeof(BuildNote::build_id), kBuildNoteType, {}, {}};
  for (size_t i = 0; i < sizeof(kBuildNoteName); ++i) note.name[i] = kBuildNoteName[i];
  for (size_t i = 0; i < N; ++i) note.build_id[i] = build_id[i];
  return note;
}

}  // namespace tq

// Once in each kernel library. A section of this name becomes a note, which no linker drops; notes are aligned to 4.
#define TQ_BUILD_NOTE(build_id)                                                                            \
  [[gnu::section(".note.tq_backend"), gnu::used, gnu::aligned(4)]] constexpr tq::BuildNote tq_build_note = \
      tq::make_build_note(build_id)
