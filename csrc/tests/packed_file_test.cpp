// A reader that damage can't hurt: every header that is cut or altered, with its checksum made right again,
// is refused or read within the file. Run under the sanitizers, this shows that no length or offset is
// believed.
#include "packed_file.h"

#include <unistd.h>

#include <cstring>
#include <fstream>
#include <string>

#include "check.h"
#include "decoder.h"

using namespace relufy;

namespace {

using Bytes = std::vector<unsigned char>;

template <class T>
void put(Bytes& bytes, size_t at, T value) {
  std::memcpy(&bytes[at], &value, sizeof value);
}

void put_name(Bytes& bytes, size_t at, const std::string& name) {
  std::memcpy(&bytes[at], name.data(), name.size());
}

void put_checksum(Bytes& bytes, size_t header_bytes) {
  put<uint32_t>(bytes, 12, 0);
  put<uint32_t>(bytes, 12, crc32(bytes.data(), std::min(header_bytes, bytes.size())));
}

constexpr size_t kHeaderBytes = 64 + 2 * 64 + 2 * 128, kPayload = 192 + 320;

void put_tensor(Bytes& bytes, size_t at, const std::string& name, Layout layout, uint64_t rows,
                uint64_t columns, uint64_t stride, uint64_t offset, uint64_t size) {
  put_name(bytes, at, name);
  put<uint32_t>(bytes, at + 64, 1);
  put<uint32_t>(bytes, at + 68, static_cast<uint32_t>(layout));
  uint64_t fields[] = {rows, columns, stride, offset, size};
  std::memcpy(&bytes[at + 72], fields, sizeof fields);
}

// Two numbers, a matrix of 3 x 5 in rows and the same in columns.
Bytes valid_file() {
  Bytes bytes(kHeaderBytes + kPayload + 64);
  std::memcpy(bytes.data(), "RELUFY\x1a\n", 8);
  put<uint32_t>(bytes, 8, kFormatVersion);
  put<uint64_t>(bytes, 16, kHeaderBytes);
  put<uint64_t>(bytes, 24, bytes.size());
  put<uint32_t>(bytes, 32, 2);
  put<uint32_t>(bytes, 36, 2);
  put_name(bytes, 64, "layers");
  put<double>(bytes, 64 + 56, 7.0);
  put_name(bytes, 128, "epsilon");
  put<double>(bytes, 128 + 56, 0.5);
  put_tensor(bytes, 192, "a", Layout::rows, 3, 5, 64, kHeaderBytes, 192);
  put_tensor(bytes, 320, "b", Layout::columns, 3, 5, 64, kHeaderBytes + 192, 320);
  put_checksum(bytes, kHeaderBytes);
  return bytes;
}

const std::string kPath = "packed_file_test." + std::to_string(getpid()) + ".relufy";

void write(const Bytes& bytes) {
  std::ofstream(kPath, std::ios::binary).write(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}

// Reads every float that a tensor claims to have, so that a sanitizer sees any that is not there.
float touch(const Tensor& t) {
  float sum = 0;
  for (size_t i = 0; i < t.bytes / sizeof(float); ++i) sum += t.vector()[i];
  return sum;
}

void read_all() {
  PackedFile file(kPath);
  if (file.has_tensor("a")) touch(file.matrix("a", 3, 5));
  if (file.has_tensor("b")) touch(file.matrix("b", 3, 5));
  file.whole("layers", 0, 1000);
  file.number("epsilon");
}

void test_reads_a_valid_file() {
  write(valid_file());
  PackedFile file(kPath);
  CHECK(file.whole("layers", 1, 10) == 7);
  CHECK(file.number("epsilon") == 0.5);
  CHECK(throws<FileError>([&] { file.whole("epsilon", 0, 10); }));
  CHECK(throws<FileError>([&] { file.whole("layers", 8, 10); }));
  CHECK(throws<FileError>([&] { file.number("missing"); }));
  CHECK(file.matrix("a", 3, 5).layout == Layout::rows);
  CHECK(file.matrix("b", 3, 5).layout == Layout::columns);
  CHECK(throws<FileError>([&] { file.matrix("a", 5, 3); }));
  CHECK(throws<FileError>([&] { Decoder decoder(file); }));
}

void test_refuses_every_truncation() {
  Bytes bytes = valid_file();
  for (size_t size = 0; size < bytes.size(); size += 7) {
    write(Bytes(bytes.begin(), bytes.begin() + size));
    CHECK(throws<FileError>(read_all));
    Bytes shorter(bytes.begin(), bytes.begin() + size);
    if (size < kHeaderBytes || size > kHeaderBytes + kPayload) continue;
    put<uint64_t>(shorter, 24, size);  // a file that lies about its size
    put_checksum(shorter, kHeaderBytes);
    write(shorter);
    CHECK(throws<FileError>(read_all));
  }
}

void test_refuses_a_wrong_checksum() {
  for (size_t at = 0; at < kHeaderBytes; at += 3) {
    Bytes bytes = valid_file();
    bytes[at] ^= 0x10;
    write(bytes);
    CHECK(throws<FileError>(read_all));
  }
}

void test_survives_any_header() {
  std::mt19937 generator(0);
  size_t refused = 0;
  for (int round = 0; round < 3000; ++round) {
    Bytes bytes = valid_file();
    for (int changes = 1 + generator() % 3; changes > 0; --changes) {
      size_t at = 16 + generator() % (kHeaderBytes - 16);
      bytes[at] = generator() % 2 ? static_cast<unsigned char>(generator()) : 0xFF;
    }
    put_checksum(bytes, kHeaderBytes);
    write(bytes);
    refused += throws<FileError>(read_all);
  }
  CHECK(refused > 300);
}

}  // namespace

int main() {
  CHECK(crc32(reinterpret_cast<const unsigned char*>("123456789"), 9) == 0xCBF43926u);
  CHECK(throws<FileError>([] { PackedFile("no such file"); }));
  test_reads_a_valid_file();
  test_refuses_every_truncation();
  test_refuses_a_wrong_checksum();
  test_survives_any_header();
  std::remove(kPath.c_str());
}
