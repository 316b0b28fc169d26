// delay_switch DELAY_NS BITS_PER_SECOND NAMESPACE...: a network switch in user space that delays every frame.
//
// Makes a TAP device eth0 in each namespace, prints "ready", and forwards until its standard input ends. A frame leaves
// DELAY_NS after it came, and not before the frames ahead of it on the same port have left at BITS_PER_SECOND (0: no
// limit). Ports are found by the last byte of the MAC address, which it sets.

#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <net/if_arp.h>
#include <sched.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <string>
#include <vector>

namespace {

constexpr int kMtu = 9000;
constexpr int kFrame = kMtu + 64;
constexpr int kFramesATurn = 64;  // of one port, so that none starves the others

struct Frame {
  int64_t due;
  std::vector<char> bytes;
};

struct Port {
  int device;
  int64_t free_at = 0;
  std::deque<Frame> waiting;
};

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

int check(int result, const char* what) {
  if (result < 0) {
    std::perror(what);
    std::exit(1);
  }
  return result;
}

int open_device(const std::string& name_space, int number) {
  int handle = check(open(("/run/netns/" + name_space).c_str(), O_RDONLY | O_CLOEXEC), name_space.c_str());
  check(setns(handle, CLONE_NEWNET), "setns");
  close(handle);
  int device = check(open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC), "/dev/net/tun");
  ifreq request{};
  std::strcpy(request.ifr_name, "eth0");
  request.ifr_flags = IFF_TAP | IFF_NO_PI;
  check(ioctl(device, TUNSETIFF, &request), "TUNSETIFF");
  int control = check(socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), "socket");
  request.ifr_mtu = kMtu;
  check(ioctl(control, SIOCSIFMTU, &request), "SIOCSIFMTU");
  request.ifr_hwaddr = {};
  request.ifr_hwaddr.sa_family = ARPHRD_ETHER;
  request.ifr_hwaddr.sa_data[0] = 2;  // locally administered
  request.ifr_hwaddr.sa_data[5] = static_cast<char>(number);
  check(ioctl(control, SIOCSIFHWADDR, &request), "SIOCSIFHWADDR");
  request.ifr_qlen = 10000;
  check(ioctl(control, SIOCSIFTXQLEN, &request), "SIOCSIFTXQLEN");
  close(control);
  return device;
}

class Switch {
 public:
  Switch(int64_t delay, double bits_per_second, const std::vector<std::string>& namespaces)
      : delay_(delay), nanoseconds_a_byte_(bits_per_second > 0 ? 8e9 / bits_per_second : 0) {
    for (const std::string& name : namespaces) {
      ports_.push_back({open_device(name, static_cast<int>(ports_.size()))});
    }
  }

  void run() {
    int events = check(epoll_create1(EPOLL_CLOEXEC), "epoll_create1");
    int timer = check(timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC), "timerfd_create");
    auto watch = [&](int file, int number) {
      epoll_event event{};
      event.events = EPOLLIN;
      event.data.fd = number;
      check(epoll_ctl(events, EPOLL_CTL_ADD, file, &event), "epoll_ctl");
    };
    constexpr int kInput = -1, kTimer = -2;
    watch(STDIN_FILENO, kInput);
    watch(timer, kTimer);
    for (size_t i = 0; i < ports_.size(); ++i) {
      watch(ports_[i].device, static_cast<int>(i));
    }
    std::puts("ready");
    std::fflush(stdout);
    for (;;) {
      epoll_event happened[16];
      int count = epoll_wait(events, happened, 16, -1);
      for (int i = 0; i < count; ++i) {
        int what = happened[i].data.fd;
        if (what == kInput) {
          return;
        }
        if (what >= 0) {
          receive(what);
        }
      }
      set(timer, send_due());
    }
  }

 private:
  void receive(int from) {
    char buffer[kFrame];
    for (int i = 0; i < kFramesATurn; ++i) {
      ssize_t length = read(ports_[from].device, buffer, sizeof buffer);
      if (length < 14) {
        return;
      }
      if (buffer[0] & 1) {  // to all
        for (size_t to = 0; to < ports_.size(); ++to) {
          if (static_cast<int>(to) != from) {
            queue(ports_[to], buffer, length);
          }
        }
      } else if (static_cast<unsigned char>(buffer[5]) < ports_.size()) {
        queue(ports_[static_cast<unsigned char>(buffer[5])], buffer, length);
      }
    }
  }

  void queue(Port& port, const char* bytes, ssize_t length) {
    int64_t due = std::max(now() + delay_, port.free_at);
    port.free_at = due + static_cast<int64_t>(static_cast<double>(length) * nanoseconds_a_byte_);
    port.waiting.push_back({due, std::vector<char>(bytes, bytes + length)});
  }

  // Returns when the next frame is due, 0 if none waits.
  int64_t send_due() {
    int64_t next = 0;
    for (Port& port : ports_) {
      while (!port.waiting.empty() && port.waiting.front().due <= now()) {
        const std::vector<char>& bytes = port.waiting.front().bytes;
        if (write(port.device, bytes.data(), bytes.size()) < 0) {
          // A full queue loses the frame, as a real one does.
        }
        port.waiting.pop_front();
      }
      if (!port.waiting.empty()) {
        int64_t due = port.waiting.front().due;
        next = next == 0 ? due : std::min(next, due);
      }
    }
    return next;
  }

  static void set(int timer, int64_t at) {
    itimerspec spec{};
    spec.it_value.tv_sec = at / 1000000000;
    spec.it_value.tv_nsec = at % 1000000000;
    check(timerfd_settime(timer, TFD_TIMER_ABSTIME, &spec, nullptr), "timerfd_settime");
  }

  int64_t delay_;
  double nanoseconds_a_byte_;
  std::vector<Port> ports_;
};

}  // namespace

int main(int count, char** arguments) {
  if (count < 4) {
    std::fprintf(stderr, "use: %s DELAY_NS BITS_PER_SECOND NAMESPACE...\n", arguments[0]);
    return 2;
  }
  std::vector<std::string> namespaces(arguments + 3, arguments + count);
  Switch(std::atoll(arguments[1]), std::atof(arguments[2]), namespaces).run();
  return 0;
}
