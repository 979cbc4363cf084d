// The kernels' own test: every instruction set against the definitions, between guard pages.
//
//   check [PARTS]        fixed cases, or one of so many of them
//   fuzz SECONDS SEED    random cases from the seed on, for as long
//   case SEED            one of those again
//
// Exit status: 0 all good, 1 a wrong result, 2 wrong usage, 3 a byte touched that must not be.
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "isas.h"

#define FASTKD_ISA baseline
#include "arithmetic.h"
#include "divergence.h"
#include "elements.h"
#include "fixed.h"
#include "large.h"

namespace fastkd {
#define FASTKD_NAME(name, Struct) #name,
const char* const kDivergences[] = {FASTKD_DIVERGENCES(FASTKD_NAME)};
#undef FASTKD_NAME
const int kDivergenceCount = sizeof(kDivergences) / sizeof(kDivergences[0]);
char* scratch(int64_t bytes) { return check::fresh_scratch(bytes); }
}  // namespace fastkd

#if defined(CHECK_ASAN)
extern "C" void __sanitizer_set_death_callback(void (*)());
#endif

namespace {

using check::Case;
using check::Report;

void say(const char* text) {
  if (write(STDOUT_FILENO, text, std::strlen(text)) < 0) _exit(4);
}

void say_current_case() {
  say("FAILED in ");
  say(check::current_case);
  say("\n");
}

void on_fault(int number) {
  say(number == SIGABRT  ? "FAILED: the memory's book-keeping is broken\n"
      : number == SIGILL ? "FAILED: an instruction that does not run\n"
                         : "FAILED: a byte was touched that must not be\n");
  say_current_case();
  _exit(3);
}

void watch() {
  struct sigaction action = {};
  action.sa_handler = on_fault;
  for (int number : {SIGSEGV, SIGBUS, SIGABRT, SIGILL}) sigaction(number, &action, nullptr);
#if defined(CHECK_ASAN)
  __sanitizer_set_death_callback(say_current_case);
#endif
}

double seconds() {
  using Clock = std::chrono::steady_clock;
  return std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
}

int finish(const Report& report, int64_t cases, double since) {
  cases -= static_cast<int64_t>(check::left_out);
  std::string isas;
  for (const fastkd::Isa& isa : fastkd::all_isas())
    if (isa.runs) isas += std::string(isas.empty() ? "" : ", ") + isa.name;
  const double took = seconds() - since;
  std::printf("%lld cases, %d failures, %.1f s, %.0f cases per second (%s)\n",
              static_cast<long long>(cases), report.failures, took,
              static_cast<double>(cases) / took, isas.c_str());
  return report.failures == 0 ? 0 : 1;
}

int fixed() {
  const double since = seconds();
  Report report;
  int64_t cases = 0;
  for (const fastkd::Isa& isa : fastkd::all_isas()) {
    if (!isa.runs) continue;
    check::functions(isa, report);
    check::halves(isa, report);
    cases += check::distant_rows(isa, report);
    cases += check::elements(isa, report);
  }
  cases += check::fixed_cases(report);
  cases += check::long_rows(1, report);
  return finish(report, cases, since);
}

int fuzz(double limit, uint64_t seed) {
  const double since = seconds();
  Report report;
  int64_t cases = 0;
  for (; seconds() - since < limit && report.failures == 0; ++cases)
    check::check_case(check::draw(seed + static_cast<uint64_t>(cases)), report);
  if (report.failures != 0)
    std::printf("again by: case %llu\n",
                static_cast<unsigned long long>(seed + static_cast<uint64_t>(cases - 1)));
  return finish(report, cases, since);
}

int one(uint64_t seed) {
  const double since = seconds();
  Report report;
  const Case c = check::draw(seed);
  std::printf("%s\n", c.text().c_str());
  check::check_case(c, report);
  return finish(report, 1, since);
}

}  // namespace

int main(int count, char** words) {
  const std::string mode = count > 1 ? words[1] : "";
  watch();
  if (mode == "check" && count == 3) check::parts = std::strtoull(words[2], nullptr, 10);
  if (mode == "check" && (count == 2 || check::parts > 1)) return fixed();
  if (mode == "fuzz" && count == 4)
    return fuzz(std::atof(words[2]), std::strtoull(words[3], nullptr, 10));
  if (mode == "case" && count == 3) return one(std::strtoull(words[2], nullptr, 10));
  std::fprintf(stderr, "usage: check [PARTS] | fuzz SECONDS SEED | case SEED\n");
  return 2;
}
