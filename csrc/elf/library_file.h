// library_file.h - what the file of a shared library says about itself, read before anybody opens it. dlopen blocks on
// a FIFO, dies of SIGBUS in a file that was cut short, and runs constructors before a caller can look at anything.
#pragma once

#include <string>

namespace tq {

// Returns one sentence that says why this file cannot be a whole shared library for this machine; empty if it can.
// *build_id, if not null, gets the text of the file's BuildNote; empty if it carries none.
std::string read_library_file(const std::string& path, std::string* build_id = nullptr);

}  // namespace tq
