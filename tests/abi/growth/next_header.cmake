# next_header.cmake - makes header 1.1 of the tests from today's: a field appended to every struct, and a function to the
# table. Made, not written, so that a struct which is added is grown too.
#   cmake -DIN=HEADER -DOUT=HEADER -P next_header.cmake
file(READ ${IN} text)
# A struct's last line before its brace ends a field; an enum's does not.
string(REGEX REPLACE "(;[^\n]*)\n} (Tq[A-Za-z]+);\n" "\\1\n  int64_t appended;\n} \\2;\n" text "${text}")
string(REPLACE "  int64_t appended;\n} TqApi;" "  int64_t (*appended)(int64_t x); /* x + 1 */\n} TqApi;" text "${text}")
string(REPLACE "#define TQ_ABI_MINOR 0" "#define TQ_ABI_MINOR 1" text "${text}")
string(REGEX MATCHALL "typedef struct Tq[A-Za-z]+ {" structs "${text}")
string(REGEX MATCHALL "int64_t [(*]*appended" fields "${text}")
list(LENGTH structs expected)
list(LENGTH fields found)
if(NOT expected EQUAL found OR NOT text MATCHES "TQ_ABI_MINOR 1")
  message(FATAL_ERROR "${IN} has ${expected} structs, and ${found} of them were grown")
endif()
file(WRITE ${OUT} "${text}")
