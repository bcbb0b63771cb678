// Checks whose messages reach a user: the words alone, without the name of a source file.
#pragma once
#include <sstream>
#include <stdexcept>

namespace fastalex {

template <class... Words>
[[noreturn]] void fail(const char* op, const Words&... words) {
  std::ostringstream text;
  text << "fastalex::" << op << ": ";
  (text << ... << words);
  throw std::runtime_error(text.str());
}

// Throws unless `holds`; the words say what was wrong, what is allowed and what to do.
template <class... Words>
void require(bool holds, const char* op, const Words&... words) {
  if (!holds) fail(op, words...);
}

}  // namespace fastalex
