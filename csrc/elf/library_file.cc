#include "elf/library_file.h"

#include <elf.h>
#include <fcntl.h>
#include <link.h>
#include <sys/stat.h>
#include <unistd.h>

#include <bit>
#include <cerrno>
#include <cstring>
#include <vector>

#include "elf/build_note.h"

namespace tq {
namespace {

using Header = ElfW(Ehdr);
using Segment = ElfW(Phdr);
using Section = ElfW(Shdr);

constexpr unsigned char kClass = sizeof(void*) == 8 ? ELFCLASS64 : ELFCLASS32;
constexpr unsigned char kByteOrder = std::endian::native == std::endian::little ? ELFDATA2LSB : ELFDATA2MSB;

class File {
 public:
  // O_NONBLOCK: without it a FIFO waits for somebody who writes.
  explicit File(const std::string& path) : fd_(open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC)) {}
  ~File() {
    if (fd_ >= 0) close(fd_);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  bool is_open() const { return fd_ >= 0; }
  bool status(struct stat* out) const { return fstat(fd_, out) == 0; }

  bool read(uint64_t offset, void* to, size_t bytes) const {
    auto* at = static_cast<char*>(to);
    while (bytes > 0) {
      const ssize_t n = pread(fd_, at, bytes, static_cast<off_t>(offset));
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) return false;
      at += n;
      offset += static_cast<uint64_t>(n);
      bytes -= static_cast<size_t>(n);
    }
    return true;
  }

 private:
  int fd_;
};

const char* kind_of(mode_t mode) {
  return S_ISDIR(mode)    ? "a directory"
         : S_ISFIFO(mode) ? "a FIFO"
         : S_ISSOCK(mode) ? "a socket"
         : S_ISCHR(mode)  ? "a device"
         : S_ISBLK(mode)  ? "a device"
                          : "no regular file";
}

// count entries of a table at offset; empty if they do not lie within the file.
template <class Entry>
std::vector<Entry> read_table(const File& file, uint64_t file_bytes, uint64_t offset, uint64_t count) {
  if (offset > file_bytes || count > (file_bytes - offset) / sizeof(Entry)) return {};
  std::vector<Entry> table(count);
  if (!file.read(offset, table.data(), count * sizeof(Entry))) table.clear();
  return table;
}

bool lies_within(uint64_t offset, uint64_t bytes, uint64_t file_bytes) {
  return offset <= file_bytes && bytes <= file_bytes - offset;
}

std::string build_id_of(const File& file, const Segment& notes) {
  std::vector<char> bytes(notes.p_filesz);
  if (!file.read(notes.p_offset, bytes.data(), bytes.size())) return "";
  for (size_t at = 0; at + sizeof(ElfW(Nhdr)) <= bytes.size();) {
    ElfW(Nhdr) header;
    std::memcpy(&header, bytes.data() + at, sizeof(header));
    BuildNote note = {};
    if (bytes.size() - at >= sizeof(note)) std::memcpy(&note, bytes.data() + at, sizeof(note));
    if (note.type == kBuildNoteType && note.name_bytes == sizeof(kBuildNoteName) &&
        note.text_bytes == sizeof(note.build_id) &&
        std::memcmp(note.name, kBuildNoteName, sizeof(kBuildNoteName)) == 0) {
      return {note.build_id, strnlen(note.build_id, sizeof(note.build_id))};
    }
    const auto padded = [](uint64_t n) { return (n + 3) / 4 * 4; };
    at += sizeof(header) + padded(header.n_namesz) + padded(header.n_descsz);
  }
  return "";
}

}  // namespace

std::string read_library_file(const std::string& path, std::string* build_id) {
  const File file(path);
  if (!file.is_open()) return path + " cannot be read: " + std::strerror(errno);
  struct stat status = {};
  if (!file.status(&status)) return path + " cannot be read: " + std::strerror(errno);
  if (!S_ISREG(status.st_mode)) return path + " is " + kind_of(status.st_mode) + "; it must be a shared library";
  const auto bytes = static_cast<uint64_t>(status.st_size);

  std::string cut_short = path + " is cut short: it has " + std::to_string(bytes) +
                          " bytes, less than its own tables say; install it again";
  Header header = {};
  if (bytes < sizeof(header) || !file.read(0, &header, sizeof(header)) ||
      std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0) {
    return path + " is no ELF file; it must be a shared library";
  }
  if (header.e_ident[EI_CLASS] != kClass || header.e_ident[EI_DATA] != kByteOrder || header.e_type != ET_DYN ||
      header.e_phentsize != sizeof(Segment)) {
    return path + " is an ELF file, but no shared library for this machine";
  }
  const auto segments = read_table<Segment>(file, bytes, header.e_phoff, header.e_phnum);
  if (segments.empty()) return cut_short;
  for (const Segment& segment : segments) {
    if (!lies_within(segment.p_offset, segment.p_filesz, bytes)) return cut_short;
  }
  // The section table is what a linker writes last, so it misses first. Programs that shorten libraries may drop it.
  if (header.e_shoff != 0) {
    if (header.e_shentsize != sizeof(Section)) return path + " is an ELF file, but no shared library for this machine";
    const auto sections = read_table<Section>(file, bytes, header.e_shoff, header.e_shnum);
    if (sections.size() != header.e_shnum) return cut_short;
    for (const Section& section : sections) {
      if (section.sh_type != SHT_NOBITS && section.sh_type != SHT_NULL &&
          !lies_within(section.sh_offset, section.sh_size, bytes)) {
        return cut_short;
      }
    }
  }
  if (build_id == nullptr) return "";
  build_id->clear();
  for (const Segment& segment : segments) {
    if (segment.p_type == PT_NOTE && build_id->empty()) *build_id = build_id_of(file, segment);
  }
  return "";
}

}  // namespace tq
