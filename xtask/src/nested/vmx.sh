
# A host with VMX: the command's files are in the first root file system, and serial ports carry
# what it prints. Runs /job/command, and reports "ready" and "exit STATUS".
for port in 1 2 3; do
    stty -F /dev/ttyS$port raw -echo 115200
done
mkdir -p /tmp /run /var/tmp
chmod 1777 /tmp /var/tmp
echo ready >&3
/bin/sh /job/command </dev/null >/dev/ttyS1 2>/dev/ttyS2 3>&-
status=$?
# Changed settings wait until all is written.
for port in 1 2; do
    stty -F /dev/ttyS$port raw -echo 9600
done
echo "exit $status" >&3
exec poweroff -f
